"""A program in ONNX, run by onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.bundle import Bundle
from serving.errors import BadBundle, ServingError
from serving.runtimes import Run


def load(path: Path, bundle: Bundle, threads: int, device: str) -> Run:
    """Raises ServingError without onnxruntime, BadBundle for a file that is no program of ONNX."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ServingError(f"{path}: needs onnxruntime, which is not installed: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that spin while they wait take the CPU from the server's front and from other workers.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = ["CPUExecutionProvider"]
    if device.startswith("cuda"):
        providers.insert(0, "CUDAExecutionProvider")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # whatever the loader meets is about this file
        text = str(error).partition("\n")[0]
        raise BadBundle(f"{path}: is no program of ONNX ({type(error).__name__}: {text})") from error
    names = [entry.name for entry in session.get_inputs()]
    if len(names) != len(bundle.signature.inputs):
        raise BadBundle(f"{path}: takes {len(names)} inputs, the signature has {len(bundle.signature.inputs)}")

    def run(inputs: list[NDArray[np.generic]]) -> list[NDArray[np.generic]]:
        found: list[Any] = session.run(None, dict(zip(names, inputs, strict=True)))
        return found

    return run

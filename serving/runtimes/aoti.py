"""A program compiled by AOTInductor: native code of the bundle's author, which runs in this process."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from serving.bundle import Bundle
from serving.errors import BadBundle, ServingError
from serving.runtimes import Run


def load(path: Path, bundle: Bundle, threads: int, device: str) -> Run:
    """Raises ServingError on a CPU that can't run it, BadBundle for a file that is no such package."""
    if platform.machine() == "x86_64" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        raise ServingError(f"{path}: was compiled for CPUs with AVX2, which this one is not; export with --format pt2")
    torch.set_num_threads(threads)
    try:
        package = torch._inductor.aoti_load_package(str(path))
    except Exception as error:  # whatever the loader meets is about this file
        text = str(error).partition("\n")[0]
        raise BadBundle(f"{path}: is no package of AOTInductor ({type(error).__name__}: {text})") from error

    def run(inputs: list[NDArray[np.generic]]) -> list[NDArray[np.generic]]:
        # The code was compiled for one order of memory and does not look at another.
        tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in inputs]
        with torch.inference_mode():
            outputs = package(*tensors)
        outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
        return [output.numpy() for output in outputs]

    return run

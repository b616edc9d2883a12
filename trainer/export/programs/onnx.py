"""ONNX, for onnxruntime."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch

from trainer.export.programs import NotHere, first_line

NEEDED = ("onnx", "onnxscript", "onnxruntime")
LARGEST = 1_900_000_000
"""Bytes of weights: an ONNX file ends at 2 GB, and a second file beside it would be needed."""


def require() -> None:
    """Raises NotHere where a package is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise NotHere(f"{', '.join(missing)} not installed: pip install {' '.join(missing)}")


def write(graph: torch.export.ExportedProgram, path: Path) -> None:
    """Write the graph with its weights as one ONNX file. Raises NotHere for what ONNX has no words for."""
    require()
    if sum(t.numel() * t.element_size() for t in graph.state_dict.values()) > LARGEST:
        raise NotHere("the weights are larger than the 2 GB of an ONNX file")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            made = torch.onnx.export(graph, dynamo=True, external_data=False, optimize=True, verbose=False)
    except Exception as error:  # of the converter: about this model
        raise NotHere(f"torch.onnx.export: {first_line(error)}") from error
    assert made is not None
    made.save(path, external_data=False)

"""What runs a program's file: one format a file, each with `load(path, bundle, threads, device)`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol

from serving.bundle import Bundle
from serving.errors import ServingError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RUNTIMES = ("pt2", "onnx", "aoti")


class Run(Protocol):
    """A program, ready."""

    def __call__(self, inputs: list[NDArray[np.generic]]) -> list[NDArray[np.generic]]:
        """One batch: arrays in the order of the signature, the first dimension the batch."""
        ...


def load(bundle: Bundle, threads: int, device: str = "cpu") -> Run:
    """The program of a bundle. Raises ServingError for a runtime that is unknown or not installed."""
    name = bundle.program.runtime
    if name not in RUNTIMES:
        raise ServingError(f"bundle.json: program.runtime: unknown {name!r}; this version knows {', '.join(RUNTIMES)}")
    found: Run = importlib.import_module(f"serving.runtimes.{name}").load(
        bundle.file(bundle.program.file), bundle, threads, device
    )
    return found

"""What `trainer export` was asked for. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FORMATS = ("auto", "pt2", "onnx", "aoti", "safetensors")
QUANTISED = ("int8", "bf16")


@dataclass(frozen=True)
class Wanted:
    """Options of one export."""

    output: Path
    name: str
    format: str = "pt2"
    """One of `FORMATS`; `auto` takes the quickest that is within its tolerance."""
    checkpoint: str = "best"
    golden: int = 32
    """Golden requests."""
    quantise: tuple[str, ...] = ()
    """Of `QUANTISED`: made beside the format in full precision."""
    samples: int | None = None
    """Samples of the split that are compared; None for all."""
    price: float | None = None
    """US dollars for an hour of a machine like this one."""
    p95_ms: float = 100.0
    """Milliseconds within which 95 % of answers are wanted, for the capacity card."""
    force: bool = False
    """Replace a bundle that is there."""

"""What a program takes and gives: names, types, shapes, units, labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from serving.errors import BadBundle

DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")


@dataclass(frozen=True)
class Field:
    """One tensor."""

    name: str
    dtype: str
    """As numpy names it: one of `DTYPES`."""
    shape: tuple[int, ...]
    """-1 is the batch, always first."""
    unit: str = ""
    """What a value of 1 means: `pixel value 0..255`, `probability`."""
    description: str = ""


@dataclass(frozen=True)
class Signature:
    """All that goes in and comes out of the program, each in the program's order."""

    inputs: tuple[Field, ...]
    outputs: tuple[Field, ...]
    labels: tuple[str, ...] | None = None
    """Names of the classes, in the order of the scores."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> Signature:
        """Raises BadBundle for what is no signature."""
        try:
            labels = content["labels"]
            inputs, outputs = (tuple(_field(item) for item in content[key]) for key in ("inputs", "outputs"))
            return cls(inputs, outputs, tuple(map(str, labels)) if labels is not None else None)
        except (KeyError, TypeError, ValueError) as error:
            raise BadBundle(f"bundle.json: signature: {type(error).__name__}: {error}") from error


def _field(content: Mapping[str, Any]) -> Field:
    found = Field(**{**content, "shape": tuple(content["shape"])})
    if found.dtype not in DTYPES:
        raise ValueError(f"{found.name}: unknown dtype {found.dtype!r}")
    if not found.shape or found.shape[0] != -1 or not all(type(size) is int for size in found.shape):
        raise ValueError(f"{found.name}: shape {list(found.shape)} does not begin with the batch, -1")
    return found

"""How a program's outputs for one sample are told: one kind a file, each with `build(spec, signature)`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from serving.errors import ServingError
from serving.signature import Signature

Row = tuple[NDArray[Any], ...]
"""One sample's outputs, in the signature's order, without the batch dimension."""
KINDS = ("classification", "tensor")


class Output(Protocol):
    """One kind of output."""

    def render(self, row: Row, top: int | None = None) -> dict[str, Any]:
        """Plain data; `top` keeps the best few where there are scores."""
        ...

    def schema(self) -> dict[str, Any]:
        """JSON Schema of one prediction."""
        ...


def load(spec: Mapping[str, Any], signature: Signature) -> Output:
    """The kind of output that a bundle's `postprocessing` names. Raises ServingError for an unknown one."""
    kind = spec.get("kind")
    if kind not in KINDS:
        raise ServingError(f"bundle.json: postprocessing.kind: unknown {kind!r}; this version knows {', '.join(KINDS)}")
    found: Output = importlib.import_module(f"serving.outputs.{kind}").build(spec, signature)
    return found

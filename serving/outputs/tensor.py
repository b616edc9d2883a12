"""Outputs as they are: nested lists by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serving.outputs import Row
from serving.signature import Signature


class Tensors:
    """Tells all outputs by name."""

    def __init__(self, signature: Signature) -> None:
        self._fields = signature.outputs

    def render(self, row: Row, top: int | None = None) -> dict[str, Any]:
        return {field.name: array.tolist() for field, array in zip(self._fields, row, strict=True)}

    def schema(self) -> dict[str, Any]:
        return {"type": "object", "required": [field.name for field in self._fields]}


def build(spec: Mapping[str, Any], signature: Signature) -> Tensors:
    return Tensors(signature)

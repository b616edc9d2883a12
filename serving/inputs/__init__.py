"""What a client may send for one sample, and how it becomes arrays: a kind a file, each with `build(spec, signature)`.

`parse` runs in the server's front, where it must be quick; `prepare` in the process that runs the model.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from serving.errors import ServingError
from serving.signature import Signature

Arrays = tuple[NDArray[Any], ...]
KINDS = ("picture", "tensor")


@dataclass(frozen=True, slots=True)
class Encoded:
    """The bytes of a picture's file, to be decoded where the model runs."""

    data: bytes
    where: str
    """The part of the request that it came from, for messages: `instances[3]`."""


Sample = Encoded | Arrays
"""One sample as parsed: arrays without a batch dimension, or a picture yet to be decoded."""


class Input(Protocol):
    """One kind of input."""

    def parse(self, instance: Any, where: str) -> Encoded | Arrays:
        """A sample out of decoded JSON. Raises BadInput, which says what was expected in `where`."""
        ...

    def parse_bytes(self, data: bytes, where: str) -> Encoded | Arrays:
        """A sample out of the raw body of a request. Raises BadInput where this kind has no such form."""
        ...

    def prepare(self, sample: Encoded | Arrays) -> Arrays:
        """The arrays that the program takes, without a batch dimension. Raises BadInput."""
        ...

    def schema(self) -> dict[str, Any]:
        """JSON Schema of one instance."""
        ...


def load(spec: Mapping[str, Any], signature: Signature) -> Input:
    """The kind of input that a bundle's `preprocessing` names. Raises ServingError for an unknown one."""
    kind = spec.get("kind")
    if kind not in KINDS:
        raise ServingError(f"bundle.json: preprocessing.kind: unknown {kind!r}; this version knows {', '.join(KINDS)}")
    found: Input = importlib.import_module(f"serving.inputs.{kind}").build(spec, signature)
    return found

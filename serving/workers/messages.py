"""What the front, the zygote and the workers say to each other, and how samples and rows travel.

Headers are MessagePack of the structures below; arrays and pictures follow as they lie in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Union

import msgspec
import numpy as np

from serving.errors import BadInput
from serving.inputs import Encoded
from serving.workers.errors import Failed
from serving.workers.wire import frame, padding

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from serving.inputs import Arrays

    Item = Encoded | Arrays | Exception
    """A sample, or a row of outputs, or why there is none."""


class Stack(msgspec.Struct, tag=0, array_like=True):
    """Samples whose arrays are alike; the body has the first array of all of them, then the second."""

    count: int
    arrays: list[tuple[str, tuple[int, ...]]]
    """(dtype, shape) of each array of one sample."""


class Picture(msgspec.Struct, tag=1, array_like=True):
    """A picture's file."""

    size: int
    where: str


class Bad(msgspec.Struct, tag=2, array_like=True):
    """A sample that can't be used."""

    field: str
    message: str
    is_undecodable: bool


class Broken(msgspec.Struct, tag=3, array_like=True):
    """A sample on which the program failed; the worker's log says how."""


Part = Union[Stack, Picture, Bad, Broken]  # noqa: UP007  # msgspec reads it at run time


class Load(msgspec.Struct, tag="load", array_like=True):
    """To a new worker: what it serves."""

    path: str
    version: str
    """What the front has read there; the files of another version are refused."""
    threads: int
    may_use_one: bool
    """Instead, where the model is so light that the front needs the cores more."""
    device: str
    max_batch: int
    verify: bool
    """Compare the hashes of all files first."""


class Hello(msgspec.Struct, tag="hello", array_like=True):
    """From the zygote: the worker exists."""

    pid: int


class Verified(msgspec.Struct, tag="verified", array_like=True):
    """From a worker: the files are those that were exported."""


class Ready(msgspec.Struct, tag="ready", array_like=True):
    """From a worker: it answers as in training, and is warm."""

    seconds: float
    deviation: float
    """Largest of the golden requests' answers."""
    count: int
    threads: int
    modules: list[str]
    """Imported since it was forked, in that order: the next worker need not."""


class Refused(msgspec.Struct, tag="refused", array_like=True):
    """From a worker or the zygote: why it can't serve."""

    reason: str
    is_mistake: bool


class Batch(msgspec.Struct, tag="batch", array_like=True):
    """To a worker: samples."""

    parts: list[Part]


class Answer(msgspec.Struct, tag="answer", array_like=True):
    """From a worker: rows, in the order of the samples of the oldest batch that it has not answered."""

    seconds: float
    """That the worker took."""
    parts: list[Part]


class End(msgspec.Struct, tag="end", array_like=True):
    """To a worker: end when all before this is answered."""


Message = Union[Load, Hello, Verified, Ready, Refused, Batch, Answer, End]  # noqa: UP007

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Message)


def encode(message: Message, buffers: Iterable[Any] = (), size: int = 0) -> bytes:
    """A message for a stream socket."""
    return frame(_ENCODER.encode(message), buffers, size)


def decode(header: memoryview) -> Message:
    """Raises msgspec.DecodeError."""
    found: Message = _DECODER.decode(header)
    return found


def pack(items: Sequence[Item]) -> tuple[list[Part], list[Any], int]:
    """What describes the items, the buffers of their bytes, and the bytes' number."""
    parts: list[Part] = []
    buffers: list[Any] = []
    size = position = 0
    while position < len(items):
        item = items[position]
        if isinstance(item, tuple):
            alike = _alike(items, position)
            stack = Stack(len(alike), [(array.dtype.str, array.shape) for array in item])
            parts.append(stack)
            for index, array in enumerate(item):
                buffers += [np.ascontiguousarray(sample[index]) for sample in alike]
                size += _close(buffers, array.nbytes * len(alike))
            position += len(alike)
            continue
        if isinstance(item, Encoded):
            parts.append(Picture(len(item.data), item.where))
            buffers.append(item.data)
            size += _close(buffers, len(item.data))
        elif isinstance(item, BadInput):
            parts.append(Bad(item.field, item.message, item.is_undecodable))
        else:
            parts.append(Broken())
        position += 1
    return parts, buffers, size


def unpack(parts: Sequence[Part], body: memoryview) -> list[Item]:
    """The items; their arrays are parts of `body`, pictures are copied out of it."""
    items: list[Item] = []
    offset = 0
    for part in parts:
        if isinstance(part, Stack):
            columns: list[NDArray[Any]] = []
            for dtype, shape in part.arrays:
                column: NDArray[Any] = np.ndarray((part.count, *shape), dtype, body, offset)
                columns.append(column)
                offset += column.nbytes + padding(column.nbytes)
            items += zip(*columns, strict=True) if columns else [()] * part.count
        elif isinstance(part, Picture):
            items.append(Encoded(bytes(body[offset : offset + part.size]), part.where))
            offset += part.size + padding(part.size)
        elif isinstance(part, Bad):
            items.append(BadInput(part.field, part.message, part.is_undecodable))
        else:
            items.append(Failed("the model failed on this instance"))
    return items


def size_of(sample: Encoded | Arrays) -> int:
    """Bytes of a sample."""
    return len(sample.data) if isinstance(sample, Encoded) else sum(array.nbytes for array in sample)


def _alike(items: Sequence[Item], start: int) -> list[Arrays]:
    """The items from `start` on that can be one stack."""
    first = items[start]
    assert isinstance(first, tuple)
    alike = [first]
    for item in items[start + 1 :]:
        if not isinstance(item, tuple) or len(item) != len(first):
            break
        if any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(item, first, strict=True)):
            break
        alike.append(item)
    return alike


def _close(buffers: list[Any], size: int) -> int:
    """Pad the section of `size` bytes that `buffers` ends with; returns its size with the padding."""
    if gap := padding(size):
        buffers.append(bytes(gap))
    return size + gap

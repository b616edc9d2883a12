"""Tensors of the Open Inference Protocol: datatypes, and their bytes."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.front.refusal import Refusal
from serving.inputs.tensor import numbers

BYTES = "BYTES"
DATATYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
}
"""numpy's name -> the protocol's."""


class Source:
    """The raw bytes after the JSON part of a request, cut into the inputs that they belong to."""

    def __init__(self, body: bytes, start: int) -> None:
        self._body, self._end = memoryview(body), start
        self._parts: dict[str, memoryview] = {}

    def find(self, name: str, size: int | None, where: str) -> None:
        """The next input takes `size` bytes; None where its data stand in the JSON. Raises Refusal."""
        if size is None:
            return
        if not 0 <= size <= len(self._body) - self._end:
            raise Refusal(400, f"{size}; the body has no so many left", f"{where}.parameters.binary_data_size")
        self._parts[name] = self._body[self._end : self._end + size]
        self._end += size

    def finish(self) -> None:
        """Raises Refusal where bytes are left over."""
        if self._end != len(self._body):
            raise Refusal(400, f"{len(self._body) - self._end} bytes after the last input")

    def part(self, name: str) -> memoryview | None:
        """The raw bytes of an input."""
        return self._parts.get(name)


def read_array(
    name: str, shape: list[int], dtype: str, data: list[Any] | None, source: Source, where: str
) -> NDArray[Any]:
    """An input as an array of its shape; what came in JSON still has numpy's own type for it. Raises Refusal."""
    binary = source.part(name)
    if binary is not None:
        wanted = math.prod(shape) * np.dtype(dtype).itemsize
        if len(binary) != wanted:
            raise Refusal(400, f"{len(binary)} bytes; {dtype} {shape} takes {wanted}", f"{where}.data")
        if dtype == "bool":
            return np.frombuffer(binary, np.uint8).reshape(shape).astype(np.bool_)
        return np.frombuffer(binary, np.dtype(dtype).newbyteorder("<")).reshape(shape)
    if data is None:
        raise Refusal(400, "is missing", f"{where}.data")
    try:
        array = numbers(data, dtype)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise Refusal(400, f"lists of different lengths; expected {shape}, nested or flat", f"{where}.data") from error
    if array.size != math.prod(shape):
        raise Refusal(400, f"{array.size} elements; the shape says {math.prod(shape)}", f"{where}.data")
    if array.ndim > 1 and array.shape != tuple(shape):
        raise Refusal(400, f"nested as {list(array.shape)}; the shape says {shape}", f"{where}.data")
    return array.reshape(shape)


def read_bytes(data: memoryview, count: int, where: str) -> list[bytes]:
    """The elements of a BYTES tensor: each with its length, four bytes, before it. Raises Refusal."""
    found: list[bytes] = []
    position = 0
    while position + 4 <= len(data) and len(found) < count:
        (length,) = struct.unpack_from("<I", data, position)
        position += 4 + length
        if position > len(data):
            break
        found.append(bytes(data[position - length : position]))
    if position != len(data) or len(found) != count:
        raise Refusal(400, f"expected {count} elements, each with its length in four bytes before it", f"{where}.data")
    return found


def pack(array: NDArray[Any]) -> bytes:
    """An array as the protocol's raw bytes; one of texts as BYTES."""
    if array.dtype == object:
        texts = [text.encode() for text in array.ravel()]
        return b"".join(struct.pack("<I", len(text)) + text for text in texts)
    return np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()

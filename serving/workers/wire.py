"""Messages on a stream socket: lengths, a header, a body. Knows nothing of what they mean, and does no input or output.

A message lies in memory of its own, its body at a multiple of 16 bytes: arrays in it are used where they lie.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Any

ALIGNMENT = 16
SCRATCH = 1 << 16
_PREFIX = struct.Struct("<QQ")
"""Bytes of the header, bytes of the body; 16 bytes itself."""


def padding(size: int) -> int:
    """Bytes from `size` to the next multiple of the alignment."""
    return -size % ALIGNMENT


def frame(header: bytes, buffers: Iterable[Any] = (), size: int = 0) -> bytes:
    """A message out of its header and the parts of its body, `size` bytes together."""
    gap = bytes(padding(len(header)))
    return b"".join((_PREFIX.pack(len(header), size), header, gap, *buffers))


class Reader:
    """Cuts a stream into messages: fill `space()`, tell `received` how much, take the messages that are whole."""

    def __init__(self) -> None:
        self._scratch = bytearray(SCRATCH)
        self._view = memoryview(self._scratch)
        self._filled = 0
        self._large: bytearray | None = None
        """A message that the scratch can't hold, being filled."""
        self._have = 0

    def space(self) -> memoryview:
        """Where the next bytes go; never empty."""
        if self._large is not None:
            return memoryview(self._large)[self._have :]
        return self._view[self._filled :]

    def received(self, count: int) -> Iterator[tuple[memoryview, memoryview]]:
        """(header, body) of each message that is whole now. Must be used up before more is read."""
        if self._large is not None:
            self._have += count
            if self._have == len(self._large):
                message, self._large = self._large, None
                yield _parts(message)
            return
        self._filled += count
        start = 0
        while self._filled - start >= _PREFIX.size:
            header, body = _PREFIX.unpack_from(self._scratch, start)
            size = _PREFIX.size + header + padding(header) + body
            have = self._filled - start
            if have < size:
                if size > SCRATCH:
                    self._large, self._have = bytearray(size), have
                    self._large[:have] = self._view[start : self._filled]
                    start = self._filled
                break
            yield _parts(bytearray(self._view[start : start + size]))
            start += size
        rest = self._filled - start
        if start and rest:
            self._scratch[:rest] = self._scratch[start : self._filled]
        self._filled = rest


def _parts(message: bytearray) -> tuple[memoryview, memoryview]:
    view = memoryview(message)
    header = _PREFIX.unpack_from(message)[0]
    start = _PREFIX.size + header + padding(header)
    return view[_PREFIX.size : _PREFIX.size + header], view[start:]

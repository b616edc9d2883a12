"""The request log: one JSON line a request, written in batches beside the event loop.

It must never cost a request: what can't be written is counted and told once, and what waits to be written is bounded.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from serving.errors import Mistake

FLUSH_SECONDS = 0.25
MOST_BYTES = 8 << 20
"""That may wait; lines past it are lost, and counted."""


class Line(msgspec.Struct, omit_defaults=True):
    """What is told about a request."""

    time: float
    """Seconds since 1970."""
    id: str
    status: int
    ms: float
    """From its first byte to its answer."""
    model: str = ""
    version: str = ""
    key: str = ""
    """Name of the API key."""
    count: int = 0
    """Instances."""
    predictions: Sequence[Any] = ()
    """[label, score] of each where there are labels."""
    inputs_sha256: str = ""
    error: str = ""


class RequestLog:
    """Appends lines to a file."""

    def __init__(self, path: Path, loop: asyncio.AbstractEventLoop) -> None:
        """Raises Mistake when the file can't be opened."""
        self._path, self._loop = path, loop
        self._file = self._open()
        self._encode = msgspec.json.Encoder().encode
        self._lines: list[bytes] = []
        self._bytes = 0
        self._writing: asyncio.Future[OSError | None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_torn = False
        self._was_told = False
        self.lost = 0
        """Lines that could not be written."""

    def add(self, line: Line) -> None:
        """Take a line; it is in the file within `FLUSH_SECONDS`, or counted as lost."""
        text = self._encode(line)
        if self._bytes + len(text) > MOST_BYTES:
            self.lost += 1
            return
        self._lines.append(text)
        self._bytes += len(text) + 1
        if self._timer is None:
            self._timer = self._loop.call_later(FLUSH_SECONDS, self._flush)

    def reopen(self) -> None:
        """Write to a new file of the same name from now on: the old one was moved away. Raises Mistake."""
        old, self._file = self._file, self._open()
        self._close_after_writing(old)

    async def close(self) -> None:
        """Write what waits, and close."""
        while self._lines or self._writing is not None:
            if self._writing is None:
                self._flush()
            if self._writing is not None:
                await asyncio.wait([self._writing])
        if self._timer is not None:
            self._timer.cancel()
        os.close(self._file)

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise Mistake(f"--request-log {self._path}: can't be opened ({error.strerror})") from error

    def _flush(self) -> None:
        self._timer = None
        if self._writing is not None or not self._lines:
            return
        lines, self._lines, self._bytes = self._lines, [], 0
        # A thread: a slow disk must not hold up the requests.
        self._writing = self._loop.run_in_executor(None, self._write, self._file, b"\n".join([*lines, b""]))
        self._writing.add_done_callback(lambda done: self._written(done.result(), len(lines)))

    def _write(self, file: int, data: bytes) -> OSError | None:
        if self._is_torn:
            data = b"\n" + data
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(file, rest) :]
        except OSError as error:
            if len(rest) < len(data):
                self._is_torn = True
            return error
        self._is_torn = False
        return None

    def _written(self, error: OSError | None, count: int) -> None:
        self._writing = None
        if error is not None:
            self.lost += count
        if error is not None and not self._was_told:
            print(f"serving: the request log can't be written ({error.strerror}): lines are lost", file=sys.stderr)
        elif error is None and self._was_told:
            print(f"serving: the request log is written again; {self.lost} lines were lost", file=sys.stderr)
        self._was_told = error is not None
        if self._lines and self._timer is None:
            self._timer = self._loop.call_later(FLUSH_SECONDS, self._flush)

    def _close_after_writing(self, file: int) -> None:
        if self._writing is None:
            os.close(file)
        else:
            self._writing.add_done_callback(lambda _: os.close(file))

"""What of `metrics.jsonl` is still to be sent: the file itself is the spool, so that nothing is kept twice.

Doesn't import mlflow: values can be counted that wait for a server which never answered.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.metrics_log import parse_entry

CHUNK = 1 << 20
QUEUE_LIMIT = 20_000
"""Values kept in memory; what is not read yet waits in `metrics.jsonl`."""


@dataclass(frozen=True, slots=True)
class Point:
    """One value of one metric."""

    key: str
    value: float
    milliseconds: int
    """Unix time."""
    step: int


class Tail:
    """New whole lines of a file that is appended to, and sometimes replaced by a shorter one."""

    def __init__(self, path: Path, position: tuple[int, int] = (0, 0)) -> None:
        self._path = path
        self._inode, self._offset = position

    @property
    def position(self) -> tuple[int, int]:
        """How far it has read: another tail can go on from there."""
        return self._inode, self._offset

    def read(self) -> tuple[list[bytes], bool]:
        """At most about `CHUNK` bytes of lines, and whether the file was replaced, so that they are its first again."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return [], False
        with file:
            found = os.fstat(file.fileno())
            replaced = self._inode not in (0, found.st_ino) or found.st_size < self._offset
            if replaced:
                self._offset = 0
            self._inode = found.st_ino
            file.seek(self._offset)
            whole, newline, _ = file.read(CHUNK).rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return whole.split(b"\n") if newline else [], replaced


class Spool:
    """The values of a run's metrics that were logged and are not sent."""

    def __init__(self, path: Path, marks: Mapping[str, int], prefix: str = "") -> None:
        """`path` is the run's `metrics.jsonl`; `marks` holds the last step sent of each metric, and is kept up to date
        by whoever sends. `prefix` comes before the name of each metric."""
        self.queue: deque[Point] = deque()
        self._path = path
        self._prefix = prefix
        self._marks = marks
        self._sent_before = dict(marks)
        self._tail = Tail(path)
        self._ahead = Tail(path)
        self._counted_from = (0, 0)
        self._count = 0

    def collect(self) -> bool:
        """Read what was logged since the last time, as far as the queue takes it; False when nothing was new."""
        if len(self.queue) >= QUEUE_LIMIT:
            return False
        lines, is_replaced = self._tail.read()
        if is_replaced:
            self.queue.clear()
            self._sent_before = dict(self._marks)
        self.queue.extend(self._points(lines))
        return bool(lines)

    def count(self) -> int:
        """How many values wait, in the queue or still in the file; each line is looked at once, however often this is
        asked while nothing is sent."""
        if self._counted_from != self._tail.position:
            self._counted_from = self._tail.position
            self._ahead, self._count = Tail(self._path, self._counted_from), 0
        while True:
            lines, is_replaced = self._ahead.read()
            if is_replaced:
                self._count = 0
            self._count += sum(1 for _ in self._points(lines))
            if not lines:
                return len(self.queue) + self._count

    def _points(self, lines: list[bytes]) -> Iterator[Point]:
        for entry in map(parse_entry, lines):
            if entry is None:
                continue  # torn by a crash; Run.log begins a new line after it
            step = int(entry.get("step", 0))
            milliseconds = int(1000 * entry.get("time", 0))
            for key, value in entry.items():
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                sent = self._sent_before.get(self._prefix + key, -1)
                if is_number and key not in ("step", "time") and step > sent:
                    yield Point(self._prefix + key, float(value), milliseconds, step)

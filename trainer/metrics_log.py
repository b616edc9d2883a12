"""`metrics.jsonl`: one JSON object a line, appended through crashes and on disks that fill. No torch."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Iterator
from json.encoder import JSONEncoder
from pathlib import Path
from typing import Any

from trainer.errors import TrainerError
from trainer.files import reason, remedy, write_atomically

TAIL_BYTES = 65536
LOOK_SECONDS = 1.0
"""A line may go into a file that is no longer there for as long as this."""
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_encode = JSONEncoder(allow_nan=False).encode


class MetricsLog:
    """The log of one run. Opened by the first `append`; written by one process, read by any."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._looked = 0.0

    def append(self, entry: dict[str, Any]) -> None:
        """Append one line. Takes microseconds: no lock, no fsync, one write.

        Raises TrainerError where it can't be written, or where the file is gone: what is written into a removed file
        is lost without a word.
        """
        try:
            line = _encode(entry)
        except ValueError:
            line = _encode({key: _finite(value) for key, value in entry.items()})
        data = f"{line}\n".encode()
        try:
            if self._descriptor is None:
                self._descriptor = self._open()
            self._look()
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            self.close()  # opened anew, it is rid of half a line
            raise TrainerError(
                f"{self.path} could not be written ({reason(error)}); {remedy(error)}, then: "
                f"trainer fit --resume {self.path.parent}"
            ) from error

    def rewind(self, step: int) -> int:
        """Drop what was logged after `step`, lines torn by a crash, and the test's result, which is found anew at the
        end; returns how many entries were dropped."""
        self.close()
        kept, dropped = [], 0
        for _, entry in self._lines():
            if entry is None or entry.get("step", 0) > step or any(key.startswith("test/") for key in entry):
                dropped += 1
            else:
                kept.append(_encode({key: _finite(value) for key, value in entry.items()}) + "\n")
        if dropped:
            write_atomically(self.path, "".join(kept).encode())
        return dropped

    def read(self) -> Iterator[dict[str, Any]]:
        """Entries in the order they were logged; a torn last line is left out.

        Raises TrainerError when a line in the middle is damaged.
        """
        torn: int | None = None
        for number, entry in self._lines():
            if torn is not None:
                raise TrainerError(f"{self.path}:{torn}: damaged line; delete it to read the others")
            if entry is None:
                torn = number
            else:
                yield entry

    def last_step(self) -> int | None:
        """Step of the last whole entry, from the end of the file only; None where nothing was logged."""
        try:
            with self.path.open("rb") as file:
                file.seek(max(file.seek(0, os.SEEK_END) - TAIL_BYTES, 0))
                lines = file.read().split(b"\n")[:-1]
        except FileNotFoundError:
            return None
        entries = (parse_entry(line) for line in reversed(lines))
        return next((int(entry["step"]) for entry in entries if entry and "step" in entry), None)

    def close(self) -> None:
        """Close the file; the next `append` opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _lines(self) -> Iterator[tuple[int, dict[str, Any] | None]]:
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            for number, line in enumerate(file, start=1):
                yield number, parse_entry(line) if line.endswith(b"\n") else None

    def _look(self) -> None:
        """FileNotFoundError where the open file is no longer the one of this name, asked once a second."""
        assert self._descriptor is not None
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        try:
            is_ours = os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except FileNotFoundError:
            is_ours = False
        if not is_ours:
            raise FileNotFoundError(errno.ENOENT, "it was removed or replaced in the middle of the run")

    def _is_torn(self) -> bool:
        try:
            with self.path.open("rb") as file:
                if file.seek(0, os.SEEK_END) == 0:
                    return False
                file.seek(-1, os.SEEK_END)
                return file.read(1) != b"\n"
        except FileNotFoundError:
            return False

    def _open(self) -> int:
        if self._is_torn():  # of a process that was killed: the next entry must not become part of it
            with self.path.open("r+b") as file:
                content = file.read()
                file.truncate(content.rfind(b"\n") + 1)
        self._looked = time.monotonic()
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)


def parse_entry(line: bytes) -> dict[str, Any] | None:
    """One line of `metrics.jsonl`, non-finite numbers restored; None when it is damaged."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    if not isinstance(entry, dict):
        return None
    return {key: NON_FINITE.get(value, value) if isinstance(value, str) else value for key, value in entry.items()}


def _finite(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"

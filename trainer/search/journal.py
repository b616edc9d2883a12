"""`journal.jsonl`: the events of a search, one JSON object a line. The file is the search's whole state."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.errors import TrainerError
from trainer.files import complete_lines, reason, remedy
from trainer.metrics_log import NON_FINITE


class Journal:
    """Written by one process, appended to only. Without a path it is kept in memory."""

    def __init__(self, path: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self._descriptor: int | None = None
        self._lines: list[str] = []

    def append(self, event: dict[str, Any], durable: bool = False) -> None:
        """Write one event, with the time; `durable` brings it to the disk before this returns.

        Raises TrainerError where it can't be written.
        """
        line = _line({**event, "time": round(self._clock(), 3)})
        if self.path is None:
            self._lines.append(line)
            return
        data = f"{line}\n".encode()
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            while data:
                data = data[os.write(self._descriptor, data) :]
            if durable:
                os.fsync(self._descriptor)
        except OSError as error:
            self.close()
            raise TrainerError(
                f"{self.path} could not be written ({reason(error)}); {remedy(error)}, then go on with --resume"
            ) from error

    def read(self) -> list[dict[str, Any]]:
        """All events; a last line torn by a crash is cut off. Raises TrainerError for one damaged in the middle."""
        if self.path is None:
            return [_restored(json.loads(line)) for line in self._lines]
        self.close()
        events = complete_lines(self.path)
        for number, event in enumerate(events, 1):
            if not isinstance(event, dict) or "event" not in event:
                raise TrainerError(f"{self.path}:{number}: damaged line; delete it to go on")
        return [_restored(event) for event in events]

    def close(self) -> None:
        """Close the file; the next `append` opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _line(event: dict[str, Any]) -> str:
    try:
        return json.dumps(event, default=_plain, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(event), default=_plain, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _restored(event: dict[str, Any]) -> dict[str, Any]:
    if isinstance(event.get("metrics"), dict):
        event["metrics"] = {name: NON_FINITE.get(value, value) for name, value in event["metrics"].items()}
    for report in event.get("reports", ()):
        report["metrics"] = {name: NON_FINITE.get(value, value) for name, value in report["metrics"].items()}
    if isinstance(event.get("values"), list):
        event["values"] = [NON_FINITE.get(value, value) for value in event["values"]]
    return event


def _plain(value: Any) -> Any:
    """numpy's numbers."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} can't be written as JSON")

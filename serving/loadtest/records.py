"""What became of each request: when it was due, how late the generator was, how long it took, how it ended."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

TIMEOUT, REFUSED, CLOSED, TLS, PROTOCOL, OTHER, WRONG = -1, -2, -3, -4, -5, -6, -7
"""How a request may end without an HTTP status; `WRONG` is a 2xx that says something else than it should."""
NAMES = {
    TIMEOUT: "timeout",
    REFUSED: "connection refused",
    CLOSED: "connection closed",
    TLS: "TLS",
    PROTOCOL: "broken HTTP",
    OTHER: "other",
    WRONG: "wrong answer",
}


@dataclass(frozen=True)
class Records:
    """Arrays with an entry for each request, in any order."""

    due: NDArray[np.float64]
    """Seconds since the start of the measurement; below 0 in the warm-up."""
    lag: NDArray[np.float32]
    """Seconds from when it was due to when the generator began to send it."""
    latency: NDArray[np.float32]
    """Seconds from when it was due to the last byte of the answer, or to the failure."""
    end: NDArray[np.int16]
    """HTTP status, or one of the negative codes of this module."""

    @property
    def is_right(self) -> NDArray[np.bool_]:
        return (self.end >= 200) & (self.end < 300)

    def after(self, seconds: float) -> Records:
        """Those that were due at `seconds` or later."""
        kept = self.due >= seconds
        return Records(self.due[kept], self.lag[kept], self.latency[kept], self.end[kept])


class Recorder:
    """Collects records, 18 bytes each."""

    def __init__(self) -> None:
        self._due, self._lag, self._latency, self._end = array("d"), array("f"), array("f"), array("h")

    def add(self, due: float, lag: float, latency: float, end: int) -> None:
        self._due.append(due)
        self._lag.append(lag)
        self._latency.append(latency)
        self._end.append(end)

    def save(self, file: Path) -> None:
        np.savez(file, due=self._due, lag=self._lag, latency=self._latency, end=self._end)


def load(files: Sequence[Path]) -> Records:
    """The records of all processes together."""
    parts = []
    for file in files:
        with np.load(file, allow_pickle=False) as content:
            parts.append({name: content[name] for name in ("due", "lag", "latency", "end")})

    def joined(name: str, dtype: type) -> NDArray[np.generic]:
        return np.concatenate([part[name] for part in parts]).astype(dtype)

    return Records(
        due=joined("due", np.float64),  # type: ignore[arg-type]
        lag=joined("lag", np.float32),  # type: ignore[arg-type]
        latency=joined("latency", np.float32),  # type: ignore[arg-type]
        end=joined("end", np.int16),  # type: ignore[arg-type]
    )


def name(end: int) -> str:
    """How an end is told."""
    return NAMES.get(end, f"status {end}")

"""When requests are due: Poisson or evenly spaced arrivals at a rate that may change over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

KINDS = ("poisson", "constant")


@dataclass(frozen=True)
class Phase:
    """A stretch of time; the rate goes evenly from one value to the other."""

    seconds: float
    first_rate: float
    last_rate: float
    """Requests per second."""

    @property
    def count(self) -> float:
        """Requests that are due in it, on average."""
        return self.seconds * (self.first_rate + self.last_rate) / 2


def arrivals(phases: Sequence[Phase], kind: str, seed: int, part: int = 0, parts: int = 1) -> NDArray[np.float64]:
    """Seconds from the start at which requests are due, rising.

    Args:
        part, parts: one generating process of several; together they make the whole rate. The sum of independent
            Poisson processes is one; evenly spaced arrivals are dealt out in turn.
    """
    total = sum(phase.count for phase in phases)
    if kind == "constant":
        marks: NDArray[np.float64] = np.arange(part, np.floor(total), parts, dtype=np.float64) + 0.5
    else:
        generator = np.random.default_rng([seed, part])
        enough = int(total / parts + 10 * np.sqrt(total / parts) + 20)
        marks = np.cumsum(generator.exponential(parts, enough))
        marks = marks[marks < total]
    return _times(phases, marks)


def _times(phases: Sequence[Phase], marks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where the expected number of arrivals since the start reaches each mark."""
    found: list[NDArray[np.float64]] = []
    start, counted = 0.0, 0.0
    for phase in phases:
        inside = marks[(marks >= counted) & (marks < counted + phase.count)] - counted
        slope = (phase.last_rate - phase.first_rate) / phase.seconds
        # Of the two forms of a quadratic's root, the one that holds for a slope of 0, too.
        root = np.sqrt(phase.first_rate**2 + 2 * slope * inside)
        found.append(start + 2 * inside / (phase.first_rate + root))
        start, counted = start + phase.seconds, counted + phase.count
    return np.concatenate(found)

"""Which rank the others wait for: each rank's time until its first exchange of a step, compared while the job runs.

A whole step takes equally long on every rank, since all wait for the slowest; what differs is how long a rank needs for
its own data and computation before it first waits. That is from the beginning of a step to its last backward pass,
during which DDP exchanges gradients. Under FSDP ranks wait in every block, and only data loading is told apart.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

RATIO = 1.3
"""Times as long as the median of the others is slow."""
LEAST_SECONDS = 0.002
"""A difference below this is noise of the operating system."""
WINDOWS, STEPS = 3, 20
"""Slow in as many judgements in a row, over at least as many steps, is persistent."""


@dataclass
class Stragglers:
    """One per rank; `judge` on rank 0."""

    rank: int
    world_size: int
    _seconds: float = 0.0
    _steps: int = 0
    _suspect: int | None = None
    _windows: int = 0
    _suspect_steps: int = 0
    _named: int | None = None
    figures: dict[str, float] = field(default_factory=dict)
    """Of the last judgement, for the log: `slowest_rank` and how many times as long as the others it takes."""

    def note(self, seconds: float) -> None:
        """This rank took as long until its first exchange in one step."""
        self._seconds += seconds
        self._steps += 1

    def share(self) -> list[float]:
        """This rank's mean time in its own place, zeros elsewhere: summed over ranks, the times of all.

        Empty for a single rank, which nobody waits for.
        """
        if self.world_size == 1:
            return []
        slots = [0.0] * self.world_size
        slots[self.rank] = self._seconds / max(self._steps, 1)
        self._seconds, steps, self._steps = 0.0, self._steps, 0
        self._suspect_steps += steps
        return slots

    def judge(self, times: Sequence[float]) -> str | None:
        """Take the mean times of all ranks since the last call; a line to tell when a rank is found, or catches up."""
        slowest = max(range(len(times)), key=lambda rank: times[rank])
        others = statistics.median(time for rank, time in enumerate(times) if rank != slowest)
        ratio = times[slowest] / others if others > 0 else 1.0
        self.figures = {"slowest_rank": float(slowest), "slowest_rank_ratio": round(ratio, 3)}
        if ratio < RATIO or times[slowest] - others < LEAST_SECONDS:
            self._suspect = None
            if self._named is not None:
                told, self._named = f"rank {self._named} keeps up with the others again", None
                return told
            return None
        if slowest != self._suspect:
            self._suspect, self._windows, self._suspect_steps = slowest, 0, 0
        self._windows += 1
        if self._windows < WINDOWS or self._suspect_steps < STEPS or self._named == slowest:
            return None
        self._named = slowest
        return (
            f"warning: rank {slowest} is slow, and the others wait for it: {1000 * times[slowest]:.0f} ms a step "
            f"until its first exchange, the others {1000 * others:.0f} ms"
        )

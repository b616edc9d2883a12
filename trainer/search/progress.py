"""What a search says while it runs: a line for each trial that ends, not more than a reader can follow."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from trainer.progress import clock
from trainer.search.trial import FAILED, FINISHED, PRUNED, Trial

if TYPE_CHECKING:
    from trainer.search.search import Search

PAUSE_SECONDS = 0.5
"""Between two lines; a new best and a failure are always told."""


class Progress:
    """Counts and tells."""

    def __init__(self, search: Search, say: Callable[[str], None]) -> None:
        self._search, self._num, self._say = search, search.num_samples, say
        self._began, self._told = time.monotonic(), 0.0
        self._counts = Counter(trial.state for trial in search.trials.values() if trial.has_ended and trial.number >= 0)
        self._before = sum(self._counts.values())
        best = search.best()
        self._best = best[0].number if best else None

    def ended(self, trial: Trial) -> None:
        """A trial has come to its end."""
        self._counts[trial.state] += 1
        best = self._search.best()
        is_best = bool(best) and best[0].number == trial.number != self._best
        self._best = best[0].number if best else None
        now = time.monotonic()
        done = sum(self._counts.values())
        is_told = is_best or trial.state == FAILED or done == self._num or now - self._told >= PAUSE_SECONDS
        if not is_told:
            return
        self._told = now
        self._say(f"{self._of(trial)}{'  best so far' if is_best else ''}  {self._standing(done, now)}")

    def _of(self, trial: Trial) -> str:
        at = f" at {trial.reports[-1].iteration}/{self._search.max_iterations or '?'}" if trial.state == PRUNED else ""
        if trial.state == FAILED:
            return f"trial {trial.number} failed: {trial.error}"
        names = self._search.objective.modes
        values = ", ".join(f"{name}={value:.4g}" for name, value in zip(names, trial.values or (), strict=False))
        return f"trial {trial.number} {trial.state}{at}: {values}"

    def _standing(self, done: int, now: float) -> str:
        parts = [f"{self._counts[state]} {state}" for state in (FINISHED, PRUNED, FAILED) if self._counts[state]]
        here = done - self._before
        left = (now - self._began) / here * (self._num - done) if here else 0.0
        ahead = f", about {clock(left)} left" if 0 < done < self._num else ""
        return f"({done}/{self._num}: {', '.join(parts)}{ahead})"

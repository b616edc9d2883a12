"""Replays a search on a table: trials take simulated time on some slots, their results are looked up.

All contenders live in the same clock: a slot that is free asks for a trial; an iteration takes the seconds of the
table; its result is reported, and the answer says whether the trial goes on. What is compared is the regret over
trial-seconds, the seconds that trials have trained, those in vain included.

The regret is that of the incumbent: of all reports so far, the one of the highest iteration, and among these of the
best value. It is valued by what its combination reaches when it is trained to the end, also where the trial was pruned
or is still running. The best incumbent so far counts, so that a regret never rises.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from workloads.tables import Table


class Method(Protocol):
    def next(self) -> tuple[int, Mapping[str, Any]] | None:
        """Number and parameters of a new trial; None: there is none."""

    def report(self, number: int, iteration: int, value: float, seconds: float) -> bool:
        """Whether the trial goes on. `iteration` counts from 1; the last one ends the trial, whatever is answered."""


@dataclass(frozen=True)
class Replayed:
    """A step function: the regret is `regret[i]` from `spent[i]` trial-seconds on."""

    spent: np.ndarray
    regret: np.ndarray
    total: float
    """Trial-seconds at the end."""
    trials: int
    full: int
    """Trials that were trained to the end."""

    def at(self, seconds: float) -> float:
        """The regret when this much had been spent; NaN before the first report."""
        place = int(np.searchsorted(self.spent, seconds, side="right")) - 1
        return float(self.regret[place]) if place >= 0 else float("nan")


def replay(
    method: Method, table: Table, seed: int, slots: int, budget: float = float("inf"), max_trials: int | None = None
) -> Replayed:
    """Until `budget` trial-seconds are spent or `max_trials` have ended, on the results of seed `seed`, modulo."""
    which = seed % len(table.values)
    curves, seconds, regrets = table.values[which], table.seconds[which], table.regret(seed)
    sign = 1.0 if table.mode == "max" else -1.0
    order = itertools.count()
    clock: list[tuple[float, int, int, int, int]] = []  # when, tie-break, trial, combination, iteration
    numbers = itertools.count() if max_trials is None else range(max_trials)
    started = iter(numbers)

    def start(now: float) -> int:
        if next(started, None) is None or (trial := method.next()) is None:
            return 0
        combination = table.combination(trial[1])
        heapq.heappush(clock, (now + seconds[combination], next(order), trial[0], combination, 1))
        return 1

    trials = sum(start(0.0) for _ in range(slots))
    spent, full, best, steps = 0.0, 0, (0, -np.inf), [(0.0, float("inf"))]
    while clock and spent < budget:
        now, _, number, combination, iteration = heapq.heappop(clock)
        spent += seconds[combination]
        value = float(curves[combination, iteration - 1])
        if (iteration, sign * value) > best:
            best = (iteration, sign * value)
            if regrets[combination] < steps[-1][1]:
                steps.append((spent, float(regrets[combination])))
        goes_on = method.report(number, iteration, value, iteration * seconds[combination])
        if goes_on and iteration < table.iterations:
            heapq.heappush(clock, (now + seconds[combination], next(order), number, combination, iteration + 1))
        else:
            full += iteration == table.iterations
            trials += start(now)
    found = np.array(steps[1:])
    return Replayed(found[:, 0], found[:, 1], spent, trials, full)

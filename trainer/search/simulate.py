"""A search against a function instead of trainings, in simulated time: for the preview, for benchmarks, for tests."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.config import RunConfig
from trainer.search.journal import Journal
from trainer.search.search import Search
from trainer.search.space import Space
from trainer.search.trial import PRUNED, Report, Trial, Verdict

Curve = Callable[[Mapping[str, Any]], Sequence[tuple[Mapping[str, float], float]]]
"""Parameters -> of each evaluation of a whole trial (with cross-validation: of each fold) its metrics and the seconds
since the one before. An exception is the trial's own."""


@dataclass
class Simulation:
    """What came of it; times in simulated seconds."""

    search: Search
    seconds: float = 0.0
    """When the last trial ended."""
    evaluations: int = 0
    """Evaluations that were paid for, those repeated included."""
    busy: float = 0.0
    """Seconds that the slots were used, all together."""
    progress: list[tuple[float, float]] = field(default_factory=list)
    """(time, best value of any report so far), at each improvement; of one objective."""
    finished: list[tuple[float, float]] = field(default_factory=list)
    """(time, best value of a finished trial so far), at each improvement; of one objective."""


def simulate(
    config: RunConfig,
    space: Space,
    curve: Curve,
    slots: int,
    known: Sequence[Trial] = (),
    setup: float = 0.0,
    journal: Journal | None = None,
) -> Simulation:
    """Run a whole search with `slots` trials at a time; `setup`: seconds before a trial begins or goes on.

    The journal is kept in memory unless one is given, and has simulated times.
    """
    assert slots >= 1, "a search needs a slot"
    return _Executor(config, space, curve, slots, known, setup, journal).run()


class _Executor:
    def __init__(
        self,
        config: RunConfig,
        space: Space,
        curve: Curve,
        slots: int,
        known: Sequence[Trial],
        setup: float,
        journal: Journal | None,
    ) -> None:
        self._now = 0.0
        self._search = Search(config, space, journal or Journal(clock=lambda: self._now), known)
        self._curve, self._slots, self._setup = curve, slots, setup
        self._result = Simulation(self._search)
        self._queue: list[tuple[float, int, int]] = []
        """(time of the next evaluation, order, trial number)."""
        self._order = 0
        self._points: dict[int, Sequence[tuple[Mapping[str, float], float]]] = {}
        """Of each trial that has not ended; with one objective."""
        self._done: dict[int, int] = {}
        """Trial -> evaluations that its newest checkpoint has."""
        self._segments: dict[int, int] = {}
        self._trained: dict[int, float] = {}

    def run(self) -> Simulation:
        self._fill()
        while self._queue:
            self._now, _order, number = heapq.heappop(self._queue)
            self._evaluate(number)
            self._fill()
        assert self._search.is_done, "the search waits for ever"
        self._result.seconds = self._now
        return self._result

    def _fill(self) -> None:
        while len(self._queue) < self._slots:
            trial = self._search.next()
            if trial is None:
                return
            self._start(trial)

    def _start(self, trial: Trial) -> None:
        number = trial.number
        if self._segments.get(number) != trial.segment:
            self._segments[number] = trial.segment
            self._done[number] = trial.source[1] if trial.source else 0  # a step is an evaluation here
            try:
                self._points[number] = self._curve(trial.params)
            except Exception as error:
                self._search.failed(number, f"{type(error).__name__}: {error}")
                return
        if self._done.get(number, 0) >= len(self._points[number]):
            last = self._points[number][-1:]
            self._search.finished(number, dict(last[0][0]) if last else None)
            return
        self._wait_for_next(number, self._setup)

    def _wait_for_next(self, number: int, more: float = 0.0) -> None:
        seconds = self._points[number][self._done.get(number, 0)][1]
        self._trained[number] = self._trained.get(number, 0.0) + seconds
        self._result.busy += seconds + more
        self._order += 1
        heapq.heappush(self._queue, (self._now + seconds + more, self._order, number))

    def _evaluate(self, number: int) -> None:
        points, iteration = self._points[number], self._done.get(number, 0) + 1
        metrics = dict(points[iteration - 1][0])
        self._done[number] = iteration
        self._result.evaluations += 1
        is_last = iteration >= len(points)
        verdict = Verdict.CONTINUE
        if self._search.objective.is_single:
            report = Report(iteration, iteration, float(iteration), metrics, self._trained[number])
            verdict = self._search.report(number, report, is_last)
            self._note(self._result.progress, self._search.trials[number].reports[-1].metrics)
        if is_last:
            self._search.finished(number, metrics)
            self._note_finished(number)
        elif verdict in (Verdict.STOP, Verdict.REPLACE):
            self._search.pruned(number)
        elif verdict == Verdict.PAUSE:
            self._search.paused(number)
        else:
            self._wait_for_next(number)
            return
        trial = self._search.trials[number]
        if trial.has_ended:
            self._points.pop(number, None)

    def _note(self, into: list[tuple[float, float]], metrics: Mapping[str, float]) -> None:
        value, best = metrics[self._search.objective.metric], into[-1][1] if into else None
        is_better = best is None or (value > best if self._search.objective.mode == "max" else value < best)
        if value == value and is_better:
            into.append((self._now, value))

    def _note_finished(self, number: int) -> None:
        trial = self._search.trials[number]
        if self._search.objective.is_single and trial.values is not None and trial.state != PRUNED:
            self._note(self._result.finished, {self._search.objective.metric: trial.values[0]})

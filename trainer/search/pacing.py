"""How far each trial goes: a scheduler of Ray Tune, driven without Ray's controller, cluster or clock.

Ray's schedulers draw from the global `random` and `np.random`; both are seeded before every call from the search's seed
and the number of the event, so that a replay of the events decides the same.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.component import Component
from trainer.errors import UserError
from trainer.search.seeds import seeded
from trainer.search.shims import ERROR, PAUSED, PENDING, RUNNING, TERMINATED, Controller, RayTrial
from trainer.search.space import Space
from trainer.search.trial import Report, Verdict

WORST = 1e300
"""Stands for a value that is not finite: comparisons with NaN would let a trial pass."""


@dataclass(frozen=True)
class Rhythm:
    """What a scheduler is built from."""

    metric: str
    mode: Literal["max", "min"]
    space: Space
    max_iterations: int | None
    """Evaluations of a whole trial."""
    time: str = "iteration"
    """Name of the count of evaluations among the metrics."""

    def length(self, given: int | None) -> int:
        """Evaluations that rungs are laid out for. Raises UserError where nobody knows."""
        length = given if given is not None else self.max_iterations
        if length is None:
            raise UserError(
                "tune.scheduler.max: how often a trial is evaluated does not follow from the config; give the number"
            )
        return length


@dataclass
class Decision:
    """What a scheduler made of an event."""

    verdict: Verdict = Verdict.CONTINUE
    stopped: list[int] = field(default_factory=list)
    """Other trials, paused ones, that are pruned."""
    replaced: dict[int, tuple[dict[str, Any], tuple[int, int]]] = field(default_factory=dict)
    """Trial -> its new parameters and the (trial, step) whose checkpoint it goes on from."""


class Pacing:
    """One scheduler and its trials. `event`, in all methods, is the number of the event in the journal."""

    def __init__(
        self,
        scheduler: Component,
        metric: str,
        mode: Literal["max", "min"],
        space: Space,
        max_iterations: int | None,
        seed: int,
    ) -> None:
        logging.getLogger("ray.tune.schedulers").setLevel(logging.WARNING)
        self._space, self._metric, self._mode, self._seed = space, metric, mode, seed
        self._module = scheduler.module()
        self._ray = scheduler.build(Rhythm(metric, mode, space, max_iterations))
        self._controller = Controller()
        self._controller.scheduler = self._ray
        self._places: dict[int, RayTrial] = {}
        self._given = 0
        self.places_ahead = bool(getattr(self._module, "PLACES_AHEAD", False))
        """Whether trials are told to the scheduler before they begin."""

    def resize(self, num_samples: int, event: int) -> None:
        """Give places to trials that have not begun, or take them back: there are `num_samples` in all."""
        trials = self._controller.trials
        if not self.places_ahead:
            return
        with self._call(event):
            while len(trials) < num_samples:
                self._new_place()
            for trial in reversed([trial for trial in trials if trial.number is None]):
                if len(trials) > num_samples:
                    trials.remove(trial)
                    self._controller.end(trial, TERMINATED)
                    self._ray.on_trial_remove(self._controller, trial)

    def add(self, number: int, params: Mapping[str, Any], place: int | None, event: int) -> None:
        """Trial `number` begins, in the place that `choose` gave."""
        with self._call(event):
            trial = self._new_place() if place is None else self._at(place)
        trial.number, trial.status = number, RUNNING
        trial.config = self._complete(params)
        self._places[number] = trial

    def go_on(self, number: int) -> None:
        """A waiting or paused trial runs again."""
        trial = self._places[number]
        trial.status = RUNNING
        if hasattr(self._module, "go_on"):
            self._module.go_on(self._ray, trial)

    def wait(self, number: int) -> None:
        """A running trial lost its worker; one that the scheduler has paused stays so."""
        trial = self._places[number]
        if trial.status == RUNNING:
            trial.status = PENDING

    def is_paused(self, number: int) -> bool:
        """Whether the scheduler has paused the trial."""
        return self._places[number].status == PAUSED

    def report(
        self, number: int, report: Report, value: float, is_last: bool, event: int, can_start: set[int]
    ) -> Decision:
        """What a running trial and others do after its evaluation. `can_start` as for `choose`.

        The last evaluation is not judged, as in Ray: the trial ends by itself.
        """
        trial = self._places[number]
        result = {"iteration": report.iteration, self._metric: self._finite(value)}
        trial.last_result, trial.step = result, report.step
        if is_last:
            return Decision()
        yields = getattr(self._module, "yields_to_waiting", None)
        with self._call(event), self._unseen(can_start if yields is not None and yields(self._ray) else None):
            answer = self._ray.on_trial_result(self._controller, trial, result)
        decision = self._decision()
        if number in decision.replaced:
            decision.verdict = Verdict.REPLACE
        elif answer == "STOP":
            decision.verdict = Verdict.STOP
        elif answer == "PAUSE":
            decision.verdict = Verdict.PAUSE
            trial.status = PAUSED
        elif trial in self._controller.saves:
            decision.verdict = Verdict.SAVE
        self._controller.saves.clear()
        return decision

    def ended(self, number: int, event: int, failed: bool = False) -> Decision:
        """A trial has ended, by itself, by the scheduler's verdict or because it `failed`; others may follow."""
        trial = self._places[number]
        if trial.is_finished():
            return Decision()
        status = trial.status
        self._controller.end(trial, ERROR if failed else TERMINATED)
        with self._call(event):
            if status != RUNNING or not trial.last_result:
                self._ray.on_trial_remove(self._controller, trial)
            elif failed:
                self._ray.on_trial_error(self._controller, trial)
            else:
                self._ray.on_trial_complete(self._controller, trial, trial.last_result)
        return self._decision()

    def choose(self, can_start: set[int], event: int, is_idle: bool) -> tuple[int | None, int | None]:
        """(number, None) of the trial to go on with, (None, place) of the next one to begin, or (None, None).

        `can_start`: waiting and paused trials that nothing but the scheduler keeps from running. `is_idle`: nothing
        runs, so that waiting for others would have no end.
        """
        with self._call(event), self._unseen(can_start):
            chosen = self._ray.choose_trial_to_run(self._controller)
        if chosen is None and is_idle:
            chosen = next((trial for trial in self._controller.live.values() if trial.number in can_start), None)
        if chosen is None:
            return None, None
        return (None, chosen.place) if chosen.number is None else (chosen.number, None)

    def checkpoints(self) -> set[tuple[int, int]]:
        """(trial, step) that the scheduler may still give to another trial."""
        states = getattr(self._ray, "_trial_state", {})
        kept = (getattr(state, "last_checkpoint", None) for trial, state in states.items() if not trial.is_finished())
        return {tuple(checkpoint) for checkpoint in kept if isinstance(checkpoint, tuple)}

    @contextmanager
    def _call(self, event: int) -> Iterator[None]:
        with seeded(self._seed, event):
            yield
            if hasattr(self._module, "settle"):
                self._module.settle(self._ray)

    @contextmanager
    def _unseen(self, can_start: set[int] | None) -> Iterator[None]:
        """Trials that have begun and wait, but not for a slot, seem to run; None changes nothing."""
        if can_start is None:
            yield
            return
        waiting = [
            (trial, trial.status)
            for trial in self._controller.live.values()
            if trial.status in (PENDING, PAUSED) and trial.number is not None and trial.number not in can_start
        ]
        for trial, _status in waiting:
            trial.status = RUNNING
        try:
            yield
        finally:
            for trial, status in waiting:
                trial.status = status

    def _new_place(self) -> RayTrial:
        trial = RayTrial(self._given)
        self._given += 1
        trial.config = self._complete({})
        self._controller.trials.append(trial)
        self._controller.live[trial.place] = trial
        self._ray.on_trial_add(self._controller, trial)
        return trial

    def _at(self, place: int) -> RayTrial:
        return self._controller.live[place]

    def _decision(self) -> Decision:
        decision = Decision(stopped=[trial.number for trial in self._controller.stopped if trial.number is not None])
        self._controller.stopped.clear()
        for trial in self._controller.live.values():
            source = trial.take_source()
            if source is not None and trial.number is not None:
                decision.replaced[trial.number] = (self._active(trial.config), source)
        return decision

    def _complete(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters that are not active with a value, too: a scheduler that changes them asks for all."""
        rest = {parameter.key: parameter.bounds()[0] for parameter in self._space if parameter.key not in params}
        return {**rest, **params}

    def _active(self, config: Mapping[str, Any]) -> dict[str, Any]:
        params: dict[str, Any] = {}
        for parameter in self._space:
            if parameter.is_active(params):
                params[parameter.key] = config[parameter.key]
        return params

    def _finite(self, value: float) -> float:
        return value if math.isfinite(value) else -WORST if self._mode == "max" else WORST

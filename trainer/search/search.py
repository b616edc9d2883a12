"""A search: which trial starts next, how far each one goes, what became of it. No processes, no clock.

Everything that happens is an event of the journal, which is the whole state: a search that is made from the same config
and a journal cut anywhere goes on as the one that wrote it would have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.config import RunConfig
from trainer.errors import TrainerError, UserError
from trainer.search.journal import Journal
from trainer.search.ledger import Event, Ledger
from trainer.search.space import Space
from trainer.search.trial import RUNNING, Report, Trial, Verdict


class Search:
    """`known`: trials of another search, told to the sampler; their numbers become -1, -2, ... A journal that has
    events knows them already.

    Raises UserError for a known trial outside of the space, TrainerError for a journal that can't be replayed.
    """

    def __init__(self, config: RunConfig, space: Space, journal: Journal, known: Sequence[Trial] = ()) -> None:
        self._journal, self._ledger = journal, Ledger(config, space)
        self.objective = self._ledger.objective
        events = journal.read()
        for line, event in enumerate(events, 1):
            self._replay(event, line)
        if not events:
            for number, trial in enumerate(known, 1):
                _check_known(trial, space, len(self.objective.modes))
                self._write({"event": "known", **_known(trial), "number": -number})
        limit = self._ledger.study.limit()
        wanted = config.tune.num_samples if limit is None else min(config.tune.num_samples, limit)
        if wanted != self.num_samples:
            self._write({"event": "samples", "samples": wanted})

    @property
    def trials(self) -> dict[int, Trial]:
        """All trials that have begun, by number; negative numbers are known ones."""
        return self._ledger.trials

    @property
    def max_iterations(self) -> int | None:
        """Evaluations of a whole trial, or folds; None until a run has told."""
        return self._ledger.max_iterations

    @property
    def num_samples(self) -> int:
        """Trials of this search; a grid has no more than there are combinations."""
        return self._ledger.num_samples

    @property
    def optuna_study(self) -> Any:
        """The study, for reports."""
        return self._ledger.study.optuna_study

    @property
    def is_done(self) -> bool:
        """Whether all trials have ended."""
        ledger = self._ledger
        return ledger.begun >= ledger.num_samples and not ledger.running and not ledger.open

    def next(self) -> Trial | None:
        """The trial to start or to go on with now, running from here on; None: none right now."""
        number, place = self._choose()
        if number is not None:
            self._write({"event": "resume", "number": number})
            return self.trials[number]
        ledger = self._ledger
        has_places = ledger.pacing is not None and ledger.pacing.places_ahead
        if ledger.begun >= ledger.num_samples or (place is None and has_places):
            return None
        number = ledger.begun
        proposal = ledger.study.ask(number)
        event: Event = {"event": "begin", "number": number, "params": proposal.params}
        more = {"place": place, "attributes": proposal.attributes or None, "study": proposal.study_attributes or None}
        self._write({**event, **{key: value for key, value in more.items() if value is not None}})
        return self.trials[number]

    def learn_iterations(self, iterations: int) -> None:
        """A run tells how many evaluations it has; counts where the config doesn't tell."""
        if self.max_iterations is None:
            self._write({"event": "iterations", "iterations": iterations})

    def started(self, number: int, run: str) -> None:
        """A trial's run has a directory."""
        if run not in self.trials[number].runs:
            self._write({"event": "started", "number": number, "run": run})

    def report(self, number: int, report: Report, is_last: bool = False) -> Verdict:
        """A running trial was evaluated (cross-validation: a fold is done; `metrics` are the fold's own).

        An iteration that was reported before, as after a resume, gets its verdict of then and is not fed again.
        Raises UserError where the objective is not among the metrics.
        """
        self.objective.check(report.metrics)
        assert self.trials[number].state == RUNNING, f"trial {number} reports and is {self.trials[number].state}"
        if report.iteration <= self._ledger.last.get(number, 0):
            verdict = self._ledger.verdict_of(number, report.iteration)
            self._write({"event": "repeat", "number": number, "iteration": report.iteration, "step": report.step})
            return verdict
        event = {"event": "report", "number": number, **report.as_dict(), **({"last": True} if is_last else {})}
        new = self._ledger.apply(event, is_new=True)
        assert new is not None
        self._journal.append({**event, "verdict": str(new)})
        return new

    def finished(
        self,
        number: int,
        metrics: Mapping[str, float] | None = None,
        seconds: Mapping[str, float] | None = None,
        run: str | None = None,
    ) -> None:
        """A trial came to its end. `metrics`, of its last evaluation, count where it reported none.

        Raises UserError where the objective is missing.
        """
        found = dict(metrics or {})
        self.objective.finished(self.trials[number], found)
        self._ended("finished", number, seconds, run, metrics=found)

    def pruned(self, number: int, seconds: Mapping[str, float] | None = None, run: str | None = None) -> None:
        """A trial's run ended by STOP or REPLACE; after REPLACE the trial waits for its next segment."""
        self._ended("pruned", number, seconds, run)

    def paused(self, number: int, seconds: Mapping[str, float] | None = None, run: str | None = None) -> None:
        """A trial's run ended with a checkpoint, by PAUSE."""
        self._ended("paused", number, seconds, run)

    def failed(
        self,
        number: int,
        error: str,
        traceback: str | None = None,
        seconds: Mapping[str, float] | None = None,
        run: str | None = None,
    ) -> None:
        """A trial's own exception: it is not tried again."""
        self._ended("failed", number, seconds, run, error=error, traceback=traceback)

    def lost(self, number: int, why: str, seconds: Mapping[str, float] | None = None, run: str | None = None) -> None:
        """A trial's worker died: it goes on from its checkpoint, unless that happened more often than it may."""
        self._ended("lost", number, seconds, run, error=why)

    def interrupted(self, number: int, seconds: Mapping[str, float] | None = None, run: str | None = None) -> None:
        """A running trial's run ended with the driver: it goes on from its checkpoint. Not counted as a failure."""
        self._ended("interrupted", number, seconds, run)

    def best(self) -> list[Trial]:
        """Finished trials of this search, best first; of several objectives the Pareto front."""
        return self.objective.best(trial for number, trial in self.trials.items() if number >= 0)

    def running(self) -> list[int]:
        """Numbers of the running trials; right after a resume, of those to be called `interrupted`."""
        return sorted(self._ledger.running)

    def needed_checkpoints(self) -> set[tuple[int, int | None]]:
        """(trial, step) of checkpoints that have to stay; a step of None is the newest one."""
        alive = self._ledger.open | self._ledger.running
        needed: set[tuple[int, int | None]] = {(number, None) for number in alive}
        needed |= {source for number in alive if (source := self.trials[number].source) is not None}
        return needed | (self._ledger.pacing.checkpoints() if self._ledger.pacing else set())

    def _choose(self) -> tuple[int | None, int | None]:
        """(number of the trial to go on with, place of the one to begin); both None where the next one just begins."""
        ledger, pacing = self._ledger, self._ledger.pacing
        can_start = ledger.can_start()
        for number in sorted(can_start):
            if pacing is None or not pacing.is_paused(number):
                return number, None
        if pacing is not None and (can_start or pacing.places_ahead):
            is_idle = not ledger.running and (pacing.places_ahead or ledger.begun >= ledger.num_samples)
            return pacing.choose(can_start, ledger.events, is_idle)
        return None, None

    def _ended(self, kind: str, number: int, seconds: Mapping[str, float] | None, run: str | None, **more: Any) -> None:
        event = {"event": kind, "number": number, **more, "seconds": dict(seconds) if seconds else None, "run": run}
        self._write({key: value for key, value in event.items() if value is not None}, durable=True)

    def _write(self, event: Event, durable: bool = False) -> None:
        self._journal.append(event, durable)
        self._ledger.apply(event, is_new=True)

    def _replay(self, event: Event, line: int) -> None:
        where = f"{self._journal.path or 'journal'}:{line}"
        try:
            verdict = self._ledger.apply(event, is_new=False)
        except (AttributeError, KeyError, TypeError, ValueError, AssertionError) as error:
            raise TrainerError(f"{where}: does not follow from the lines before and the space: {error!r}") from error
        if verdict is not None and verdict != event["verdict"]:
            raise TrainerError(
                f"{where}: the scheduler decides otherwise than when this was written; put back its settings and the "
                "version of Ray, or begin another search"
            )


def _check_known(trial: Trial, space: Space, objectives: int) -> None:
    for key, value in trial.params.items():
        if key not in space or not space[key].contains(value):
            raise UserError(f"{trial.origin or 'a known trial'}: {key}={value!r} is not in the space")
    if trial.values is not None and len(trial.values) != objectives:
        raise UserError(f"{trial.origin or 'a known trial'}: has {len(trial.values)} objectives, wanted {objectives}")


def _known(trial: Trial) -> Event:
    return {
        "params": trial.params,
        "state": trial.state,
        "values": None if trial.values is None else list(trial.values),
        "reports": [report.as_dict() for report in trial.reports],
        "origin": trial.origin,
    }

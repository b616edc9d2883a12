"""The search at work: its trials go to workers, what they report comes back, until all have ended."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import checkpoint
from trainer.search.channel import Message
from trainer.search.janitor import Janitor
from trainer.search.space import overrides
from trainer.search.trial import Report, Trial, Verdict

if TYPE_CHECKING:
    from trainer.config import RunConfig
    from trainer.preemption import Preemption
    from trainer.search.folder import SearchFolder
    from trainer.search.pool import Event, Place, Pool
    from trainer.search.search import Search

TARGET = "trainer.search.child:run_trial"
"""What a worker's fork calls for a trial."""
KEEP_ALL = ("checkpoint.keep=1000000",)
"""In a population another trial may need an older checkpoint: the janitor alone removes them."""
TURN_SECONDS = 0.5
STOP_SECONDS = 60.0
"""How long trials may take to save and end after a wish to stop."""


@dataclass
class Driver:
    """Runs one search; see `run`."""

    config: RunConfig
    search: Search
    pool: Pool
    folder: SearchFolder
    wish: Preemption
    ended: Callable[[Trial], None]
    """Called with each trial that has come to its end."""
    target: str = TARGET
    _places: dict[int, Place] = field(default_factory=dict)
    """Running trial -> its worker."""
    _verdicts: dict[int, Verdict] = field(default_factory=dict)
    """Running trial -> the last answer it got."""
    _earlier_folds: dict[int, dict[str, float]] = field(default_factory=dict)
    """Running trial -> the seconds of its folds that are done."""

    def __post_init__(self) -> None:
        self._janitor = Janitor(self.folder.path, self.search, self.config.tune.keep_checkpoints)
        self._open = {n for n, trial in self.search.trials.items() if n >= 0 and not trial.has_ended}
        """Trials whose end has not been told: a scheduler may end a paused one, too."""

    def run(self) -> bool:
        """Until all trials have ended, True; or until a wish to stop, False: then all have saved and ended."""
        while not self.search.is_done:
            if self.wish.requested:
                self._stop()
                return False
            self._fill()
            for event in self.pool.wait(TURN_SECONDS):
                self._handle(event)
        return True

    # -- trials to workers ----------------------------------------------------------------------------------------

    def _fill(self) -> None:
        for place in self.pool.free():
            trial = self.search.next()
            if trial is None:
                return
            self._places[trial.number] = place
            self._open.add(trial.number)
            self._send(trial, place)

    def _send(self, trial: Trial, place: Place) -> None:
        """Have a worker train a trial: its next fold where it has folds."""
        self._verdicts[trial.number] = Verdict.CONTINUE
        self.pool.run(place, trial.number, self._order(trial))

    def _order(self, trial: Trial) -> Message:
        tune = self.config.tune
        name = f"t{trial.number:04d}"
        fold = len(trial.folds) if tune.cross_validate else None
        return order(
            self.folder,
            self.config,
            name if fold is None else f"{name}-f{fold}",
            overrides(trial.params),
            target=self.target,
            number=trial.number,
            fold=fold,
            source=self._source(trial),
            more=KEEP_ALL if tune.scheduler.name == "pbt" else (),
        )

    def _source(self, trial: Trial) -> Message | None:
        """The checkpoint of another trial that this one's segment begins from."""
        if trial.source is None:
            return None
        donor, step = trial.source
        runs = [self.folder.path.resolve() / run for run in self.search.trials[donor].runs]
        holders = [run for run in runs if (run / "checkpoints" / checkpoint.folder_name(step)).is_dir()]
        return {"run": str((holders or runs)[-1]), "step": step}

    # -- what happens on workers ----------------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        number = event.place.trial
        if number is None:
            return
        message = event.message
        if message is None:
            self._lost(number, event)
        elif message["event"] == "started":
            self._started(number, message)
            self.pool.go_on(event.place)
        elif message["event"] == "report":
            self._report(number, event.place, message)
        else:
            self._end(number, event.place, message)

    def _lost(self, number: int, event: Event) -> None:
        self._leave(number, event.place)
        self.search.lost(number, event.why)
        self._conclude(number)

    def _started(self, number: int, message: Message) -> None:
        run = Path(message["run"])
        self.search.started(number, str(run.relative_to(self.folder.path.resolve())))
        if not self.config.tune.cross_validate:
            self.search.learn_iterations(message["iterations"])

    def _report(self, number: int, place: Place, message: Message) -> None:
        verdict = Verdict.CONTINUE
        if not self.config.tune.cross_validate:
            verdict = self.search.report(number, _report(message), message["is_last"])
        self._verdicts[number] = verdict
        self.pool.answer(place, {"verdict": str(verdict)})

    def _end(self, number: int, place: Place, message: Message) -> None:
        seconds = {**message.get("seconds", {}), "slot": time.monotonic() - place.since}
        for name, value in self._earlier_folds.pop(number, {}).items():
            seconds[name] = seconds.get(name, 0.0) + value
        status = message["status"]
        if status == "finished" and self.config.tune.cross_validate and self._goes_on(number, message, seconds):
            self._send(self.search.trials[number], place)
            return
        self._leave(number, place)
        if status == "finished":
            if not self.config.tune.cross_validate:
                self.search.finished(number, message["metrics"], seconds)
        elif status == "stopped":
            self.search.pruned(number, seconds)
        elif status == "paused":
            is_asked = self._verdicts[number] is Verdict.PAUSE
            (self.search.paused if is_asked else self.search.interrupted)(number, seconds)
        elif status == "failed":
            self.search.failed(number, message["error"], message.get("traceback"), seconds)
        else:
            self.search.lost(number, _how_it_died(message), seconds)
        self._conclude(number)

    def _goes_on(self, number: int, message: Message, seconds: dict[str, float]) -> bool:
        """A fold is done: whether the trial has another one to train."""
        trial, folds = self.search.trials[number], self.config.holdout.folds
        fold = len(trial.folds) + 1
        # Steps and epochs begin anew in each fold.
        report = Report(fold, fold, float(fold), message["metrics"], seconds.get("train", 0.0))
        verdict = self.search.report(number, report, is_last=fold == folds)
        if fold == folds:
            self.search.finished(number, seconds=seconds)
        elif verdict is Verdict.STOP:
            self.search.pruned(number, seconds)
        elif verdict is Verdict.PAUSE:
            self.search.paused(number, seconds)
        else:
            self._earlier_folds[number] = seconds
            return True
        return False

    def _leave(self, number: int, place: Place) -> None:
        self.pool.leave(place)
        self._places.pop(number, None)

    def _conclude(self, number: int) -> None:
        """Whatever has ended by what happened to this trial is told; what nobody needs any more is removed."""
        for other in sorted(self._open):
            if (trial := self.search.trials[other]).has_ended:
                self._open.discard(other)
                self.ended(trial)
        self._janitor.clean(self.search.trials[number])

    # -- the wish to stop -----------------------------------------------------------------------------------------

    def _stop(self) -> None:
        """Have all trials save and end; kill those that take too long."""
        self.pool.interrupt(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while self.pool.busy() and time.monotonic() < deadline:
            for event in self.pool.wait(TURN_SECONDS):
                self._handle(event)
        for number in self.search.running():
            self.search.interrupted(number)


def order(
    folder: SearchFolder,
    config: RunConfig,
    name: str,
    trial_overrides: Sequence[str],
    *,
    target: str = TARGET,
    number: int = -1,
    fold: int | None = None,
    source: Message | None = None,
    more: Sequence[str] = (),
) -> Message:
    """What a worker is told to train: the run `name` below the search's `trials/`."""
    tune = config.tune
    return {
        "target": target,
        "config": str(folder.base.resolve()),
        "overrides": [*trial_overrides],
        "more": [*more],
        "number": number,
        "fold": fold,
        "trials_dir": str(folder.trials.resolve()),
        "name": name,
        "source": source,
        "processes": tune.processes_per_trial,
        "threads": max(1, math.floor(tune.cpus_per_trial / tune.processes_per_trial)),
        "log": str(folder.logs.resolve() / f"{name}.log"),
    }


def _report(message: Message) -> Report:
    return Report(message["iteration"], message["step"], message["epoch"], message["metrics"], message["seconds"])


def _how_it_died(message: dict[str, Any]) -> str:
    code = message.get("exit_code")
    if message.get("error"):
        return str(message["error"])
    if code is not None and code < 0:
        return f"its process was killed by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code} and without a word"

"""The state of a search as its events make it: each event changes trials, the study and the scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from trainer.config import RunConfig
from trainer.search.length import evaluations
from trainer.search.objective import Objective, mean_so_far, with_metrics
from trainer.search.pacing import Decision, Pacing
from trainer.search.rules import objectives_of
from trainer.search.saves import Saves
from trainer.search.seeds import seed_from
from trainer.search.space import Space
from trainer.search.study import Proposal, Study
from trainer.search.trial import FAILED, FINISHED, PAUSED, PRUNED, RUNNING, WAITING, Report, Trial, Verdict

Event = dict[str, Any]


class Ledger:
    """`apply` is the only way to change it, in writing a journal and in reading one."""

    def __init__(self, config: RunConfig, space: Space) -> None:
        modes = objectives_of(config)
        self.objective = Objective(modes, config.tune.value)
        self.trials: dict[int, Trial] = {}
        self.max_iterations = evaluations(config, (parameter.key for parameter in space))
        self._length = self.max_iterations
        """As far as the config tells, which is right for all trials; a run tells its own only."""
        self.num_samples = 0
        self.begun = 0
        self.running: set[int] = set()
        self.open: set[int] = set()
        """Waiting and paused trials."""
        self.study = Study(space, list(modes.values()), config.tune.sampler, config.seed)
        self.pacing: Pacing | None = None
        self.saves = Saves()
        self.events = 0
        """Number of the next event."""
        self.last: dict[int, int] = {}
        """Trial -> last iteration of its segment that was reported."""
        self._config, self._space, self._seed = config, space, seed_from(config.seed)
        self._ending: dict[int, Verdict] = {}
        """Running trials that end now, by STOP or REPLACE: the scheduler's word about themselves or others."""
        self._notable: dict[int, dict[int, Verdict]] = {}
        """Trial -> iteration of its segment -> verdict other than CONTINUE."""

    def apply(self, event: Event, is_new: bool) -> Verdict | None:
        """Make an event count; `is_new`: it happens now, and the study has proposed its parameters. Returns the
        verdict of a report. Raises UserError for a scheduler that lacks the number of evaluations."""
        action: Callable[..., Verdict | None] = getattr(self, f"_on_{event['event']}")
        verdict = action(event, is_new) if event["event"] == "begin" else action(event)
        self.events += 1
        return verdict

    def can_start(self) -> set[int]:
        """Waiting and paused trials that nothing but the scheduler, or the lack of a slot, keeps from running."""
        sources = ((number, self.trials[number].source) for number in self.open)
        return {number for number, source in sources if source is None or self.saves.is_there(source)}

    def verdict_of(self, number: int, iteration: int) -> Verdict:
        """Of an iteration that was reported before. A pause is made once; then its checkpoint is all that is asked."""
        verdict = self._notable.get(number, {}).get(iteration, Verdict.CONTINUE)
        was_served = iteration < self.last[number] or (self.pacing is not None and not self.pacing.is_paused(number))
        return Verdict.SAVE if verdict == Verdict.PAUSE and was_served else verdict

    def _on_samples(self, event: Event) -> None:
        self.num_samples = event["samples"]
        if self.pacing is not None:
            self.pacing.resize(max(self.num_samples, self.begun), self.events)
        elif self.objective.is_single:
            self._try_pacing()

    def _on_known(self, event: Event) -> None:
        reports = [Report.read(report) for report in event["reports"]]
        trial = Trial(event["number"], event["params"], event["state"], reports, origin=event["origin"])
        trial.values = tuple(event["values"]) if event["values"] is not None else None
        self.trials[trial.number] = trial
        metric = self.objective.metric
        self.study.add(trial, [report.metrics.get(metric) for report in reports])

    def _on_begin(self, event: Event, is_new: bool) -> None:
        number = event["number"]
        if not is_new:
            self.study.begin(number, Proposal(event["params"], event.get("attributes", {}), event.get("study", {})))
        self.trials[number] = Trial(number, event["params"], RUNNING, attempts=1)
        self.running.add(number)
        self.begun = max(self.begun, number + 1)
        if self.pacing is not None:
            self.pacing.add(number, event["params"], event.get("place"), self.events)

    def _on_resume(self, event: Event) -> None:
        trial = self.trials[event["number"]]
        trial.attempts += 1
        self._becomes(trial, RUNNING)
        if self.pacing is not None:
            self.pacing.go_on(trial.number)

    def _on_iterations(self, event: Event) -> None:
        self.max_iterations = event["iterations"]
        if self.pacing is None and self.objective.is_single:
            self._try_pacing()

    def _on_started(self, event: Event) -> None:
        self.trials[event["number"]].add_run(event["run"])

    def _on_repeat(self, event: Event) -> None:
        number = event["number"]
        if self.verdict_of(number, event["iteration"]) in (Verdict.SAVE, Verdict.PAUSE):
            self.saves.tell(number, event["step"])

    def _on_report(self, event: Event) -> Verdict:
        number, report = event["number"], Report.read(event)
        trial = self.trials[number]
        can_start = self.can_start()  # without those that wait for what this trial has just saved
        self.saves.heard_of(number)
        if self._config.tune.cross_validate:
            trial.folds.append(report.metrics)
            report = with_metrics(report, mean_so_far(trial.folds))
        trial.reports.append(report)
        self.last[number] = report.iteration
        if not self.objective.is_single:
            return Verdict.CONTINUE
        if self.pacing is None:
            self._make_pacing()  # raises UserError: it lacks the number of evaluations
        assert self.pacing is not None
        value = report.metrics[self.objective.metric]
        self.study.report(number, report.iteration, value)
        is_last = event.get("last", False) or (self._length is not None and report.iteration >= self._length)
        decision = self.pacing.report(number, report, value, is_last, self.events, can_start)
        self._follow(decision)
        verdict = decision.verdict
        if verdict != Verdict.REPLACE and verdict != Verdict.CONTINUE:
            self._notable.setdefault(number, {})[report.iteration] = verdict
        if verdict in (Verdict.STOP, Verdict.REPLACE):
            self._ending[number] = verdict
        if verdict in (Verdict.SAVE, Verdict.PAUSE):
            self.saves.tell(number, report.step)
        return verdict

    def _on_finished(self, event: Event) -> None:
        trial = self._came_back(event, has_ended=True)
        values = self.objective.finished(trial, event["metrics"])
        self._end(trial, FINISHED, values)

    def _on_pruned(self, event: Event) -> None:
        trial = self._came_back(event, has_ended=True)
        if self._ending.get(trial.number) == Verdict.REPLACE:
            self._waits(trial)
        else:
            self._prune(trial)

    def _on_paused(self, event: Event) -> None:
        trial = self._came_back(event, has_ended=True)
        if self._ending_otherwise(trial):
            return
        is_paused = self.pacing is not None and self.pacing.is_paused(trial.number)
        self._waits(trial, PAUSED if is_paused else WAITING)

    def _on_failed(self, event: Event) -> None:
        trial = self._came_back(event, has_ended=False)
        trial.error, trial.traceback = event["error"], event.get("traceback")
        self._end(trial, FAILED, None)

    def _on_lost(self, event: Event) -> None:
        trial = self._came_back(event, has_ended=False)
        trial.failures += 1
        if self._ending_otherwise(trial):
            return
        if trial.failures > self._config.tune.max_failures:
            trial.error = event["error"]
            self._end(trial, FAILED, None)
        else:
            self._waits(trial)

    def _on_interrupted(self, event: Event) -> None:
        trial = self._came_back(event, has_ended=False)
        if not self._ending_otherwise(trial):
            self._waits(trial)

    def _came_back(self, event: Event, has_ended: bool) -> Trial:
        """A running trial runs no more; its run `has_ended` by itself, or it was broken off."""
        trial = self.trials[event["number"]]
        assert trial.state == RUNNING, f"trial {trial.number} is {trial.state}"
        trial.add_seconds(event.get("seconds", {}))
        trial.add_run(event.get("run"))
        if has_ended:
            self.saves.heard_of(trial.number)
        return trial

    def _ending_otherwise(self, trial: Trial) -> bool:
        """Whether what the scheduler has decided makes it all the same how the run ended."""
        verdict = self._ending.get(trial.number)
        if verdict == Verdict.STOP:
            self._prune(trial)
        elif verdict == Verdict.REPLACE:
            self._give_up_saving(trial.number)
            self._waits(trial)
        return verdict is not None

    def _waits(self, trial: Trial, state: str = WAITING) -> None:
        self._ending.pop(trial.number, None)
        self._becomes(trial, state)
        if self.pacing is not None:
            self.pacing.wait(trial.number)

    def _prune(self, trial: Trial) -> None:
        self._end(trial, PRUNED, self.objective.pruned(trial))

    def _end(self, trial: Trial, state: str, values: Sequence[float] | None) -> None:
        wrong = self.objective.not_a_number(values) if values is not None else None
        if wrong is not None:
            state, trial.error = FAILED, wrong
        trial.values = tuple(values) if values is not None and wrong is None else None
        self._becomes(trial, state)
        self.study.tell(trial.number, trial.values, state)
        self._ending.pop(trial.number, None)
        self._notable.pop(trial.number, None)
        self.last.pop(trial.number, None)
        if self.pacing is not None:
            self._follow(self.pacing.ended(trial.number, self.events, state == FAILED))
        self._give_up_saving(trial.number)

    def _give_up_saving(self, donor: int) -> None:
        """Trials that wait for a checkpoint which `donor` will not come to save begin without one."""
        self.saves.give_up(donor)
        for number in self.open | self.running:
            source = self.trials[number].source
            if source is not None and source[0] == donor and not self.saves.is_there(source):
                self.trials[number].source = None

    def _becomes(self, trial: Trial, state: str) -> None:
        trial.state = state
        (self.running.add if state == RUNNING else self.running.discard)(trial.number)
        (self.open.add if state in (WAITING, PAUSED) else self.open.discard)(trial.number)

    def _follow(self, decision: Decision) -> None:
        """What a scheduler decided about trials, the one that was asked for and others."""
        for number in decision.stopped:
            trial = self.trials[number]
            if trial.state == RUNNING:  # its run is about to pause
                self._ending[number] = Verdict.STOP
            else:
                self._prune(trial)
        for number, (params, source) in decision.replaced.items():
            trial = self.trials[number]
            trial.history.append({"params": trial.params, "iteration": self.last.get(number, 0)})
            trial.params, trial.source = params, source
            trial.segment += 1
            self.study.replace(number, params)
            self.last.pop(number, None)
            self._notable.pop(number, None)
            if trial.state == RUNNING:
                self._ending[number] = Verdict.REPLACE
            else:
                self._give_up_saving(number)
                self._becomes(trial, WAITING)

    def _try_pacing(self) -> None:
        """Make the scheduler unless it needs a number of evaluations that nobody knows yet."""
        component = self._config.tune.scheduler
        given = component.options.get("max") is not None or self.max_iterations is not None
        if given or not getattr(component.module(), "NEEDS_LENGTH", False):
            self._make_pacing()

    def _make_pacing(self) -> None:
        objective, tune = self.objective, self._config.tune
        pacing = Pacing(tune.scheduler, objective.metric, objective.mode, self._space, self.max_iterations, self._seed)
        pacing.resize(max(self.num_samples, self.begun), self.events)
        for number in range(self.begun):
            trial = self.trials[number]
            place = pacing.choose(set(), self.events, False)[1] if pacing.places_ahead else None
            pacing.add(number, trial.params, place, self.events)
            if trial.has_ended:
                pacing.ended(number, self.events, failed=True)
            elif trial.state != RUNNING:
                pacing.wait(number)
        self.pacing = pacing

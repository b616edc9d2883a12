"""The Optuna study of a search: asks a sampler for parameters and tells it the truth about every trial.

A sampler is made anew for each trial from (seed, trial number), so that a proposal depends on what was told and not on
the process that asks. What a sampler notes about a trial (its generation, its place in a sequence) is plain data and
goes into the journal; `begin` puts it back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from trainer.component import Component
from trainer.search.parameter import Parameter, identity
from trainer.search.seeds import seed_from
from trainer.search.space import Space
from trainer.search.trial import FAILED, FINISHED, PRUNED, Trial

STATES = {PRUNED: TrialState.PRUNED, FAILED: TrialState.FAIL}


@dataclass(frozen=True)
class Setting:
    """What a sampler is built from."""

    space: Space
    seed: int
    """Of the search; below 2**32."""
    trial_seed: int
    """Of the trial that is asked for; below 2**32."""
    _kept: dict[str, Any] = field(default_factory=dict)

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returned when it was first called in this search: for what is the same for all trials."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]


@dataclass(frozen=True)
class Proposal:
    """A trial's parameters, and what the sampler noted."""

    params: dict[str, Any]
    attributes: dict[str, Any] = field(default_factory=dict)
    """Of the trial; plain data."""
    study_attributes: dict[str, Any] = field(default_factory=dict)
    """Of the study, those that changed; plain data."""


class Study:
    """`directions`: `max` or `min` per objective. `seed`: of the search."""

    def __init__(
        self, space: Space, directions: Sequence[Literal["max", "min"]], sampler: Component, seed: int
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space, self._sampler, self._seed = space, sampler, seed
        self._module = sampler.module()
        self._storage = InMemoryStorage()
        self.optuna_study = optuna.create_study(
            storage=self._storage,
            sampler=optuna.samplers.RandomSampler(seed=0),  # replaced before every trial
            directions=["maximize" if direction == "max" else "minimize" for direction in directions],
        )
        self._ids: dict[int, int] = {}
        self._kept: dict[str, Any] = {}
        self._distributions = {parameter.key: distribution(parameter) for parameter in space}
        self._labels = {parameter.key: labels(parameter) for parameter in space if parameter.kind == "choice"}

    def limit(self) -> int | None:
        """Number of different trials that the sampler has; None: no end."""
        return int(self._sampler.call("limit", self._setting(0))) if hasattr(self._module, "limit") else None

    def ask(self, number: int) -> Proposal:
        """Parameters for trial `number`, which is running from now on."""
        if hasattr(self._module, "propose"):
            params = self._sampler.call("propose", self._setting(number), number)
            self._add(number, params, TrialState.RUNNING, {})
            return Proposal(params)
        before = dict(self._storage.get_study_system_attrs(self._study_id))
        self.optuna_study.sampler = self._sampler.build(self._setting(number))
        trial = self.optuna_study.ask()
        self._ids[number] = trial.number
        params = {}
        for parameter in self._space:
            if parameter.is_active(params):
                params[parameter.key] = self._suggest(trial, parameter)
        if getattr(self._module, "REPLAYS_BY_ASKING", False):
            return Proposal(params)
        after = self._storage.get_study_system_attrs(self._study_id)
        changed = {key: value for key, value in after.items() if before.get(key) != value}
        return Proposal(params, self._storage.get_trial(self._id(number)).system_attrs, changed)

    def begin(self, number: int, proposal: Proposal) -> None:
        """Trial `number` was proposed in another process and is running."""
        if getattr(self._module, "REPLAYS_BY_ASKING", False):
            if self.ask(number).params != proposal.params:  # another version of the library
                self.replace(number, proposal.params)
            return
        self._add(number, proposal.params, TrialState.RUNNING, proposal.attributes)
        for key, value in proposal.study_attributes.items():
            self._storage.set_study_system_attr(self._study_id, key, value)

    def replace(self, number: int, params: Mapping[str, Any]) -> None:
        """A running trial has other parameters from now on."""
        for key, value in params.items():
            self._write(number, key, value)

    def report(self, number: int, iteration: int, value: float) -> None:
        """An intermediate value of a running trial."""
        self._storage.set_trial_intermediate_value(self._id(number), iteration, value)

    def tell(self, number: int, values: Sequence[float] | None, state: str) -> None:
        """A running trial ended; the sampler needs no `values` of one that was pruned or failed."""
        told = STATES.get(state, TrialState.COMPLETE)
        self.optuna_study.tell(self._ids[number], list(values or ()) if told == TrialState.COMPLETE else None, told)

    def add(self, trial: Trial, values: Sequence[float | None]) -> None:
        """A trial of another search. `values`: of the first objective, at each of its reports.

        One that is neither finished nor pruned, or whose values are no numbers, failed.
        """
        reported = zip(trial.reports, values, strict=True)
        intermediate = {report.iteration: value for report, value in reported if value is not None}
        is_number = trial.values is not None and all(math.isfinite(value) for value in trial.values)
        state = TrialState.FAIL
        if trial.state == PRUNED and intermediate and is_number:
            state = TrialState.PRUNED
        elif trial.state == FINISHED and is_number:
            state = TrialState.COMPLETE
        told = list(trial.values or ()) if state != TrialState.FAIL else None
        self._add(trial.number, trial.params, state, {}, told, intermediate)

    def _add(
        self,
        number: int,
        params: Mapping[str, Any],
        state: TrialState,
        attributes: dict[str, Any],
        values: list[float] | None = None,
        intermediate: dict[int, float] | None = None,
    ) -> None:
        distributions = {key: self._distributions[key] for key in params}
        template = optuna.trial.create_trial(
            state=state,
            values=values,
            params={key: self._outer(key, value) for key, value in params.items()},
            distributions=distributions,
            system_attrs=attributes,
            intermediate_values=intermediate or {},
        )
        self._ids[number] = len(self._storage.get_all_trials(self._study_id, deepcopy=False))
        self.optuna_study.add_trial(template)

    def _setting(self, number: int) -> Setting:
        return Setting(self._space, seed_from(self._seed), seed_from(self._seed, number), self._kept)

    def _suggest(self, trial: optuna.Trial, parameter: Parameter) -> Any:
        key, wanted = parameter.key, self._distributions[parameter.key]
        if isinstance(wanted, CategoricalDistribution):
            label: Any = trial.suggest_categorical(key, wanted.choices)
            return parameter.choices[self._labels[key].index(label)]
        if isinstance(wanted, IntDistribution):
            return trial.suggest_int(key, wanted.low, wanted.high, step=wanted.step, log=wanted.log)
        assert isinstance(wanted, FloatDistribution)
        value = trial.suggest_float(key, wanted.low, wanted.high, step=wanted.step, log=wanted.log)
        snapped = parameter.snap(value)  # 0.1 + 2 * 0.1 is not 0.3
        if snapped != value:
            self._storage.set_trial_param(trial._trial_id, key, snapped, wanted)
        return snapped

    def _write(self, number: int, key: str, value: Any) -> None:
        wanted = self._distributions[key]
        self._storage.set_trial_param(self._id(number), key, wanted.to_internal_repr(self._outer(key, value)), wanted)

    def _outer(self, key: str, value: Any) -> Any:
        """A value as Optuna has it."""
        return self._labels[key][position(value, self._space[key].choices)] if key in self._labels else value

    def _id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, self._ids[number])

    @property
    def _study_id(self) -> int:
        return self._storage.get_study_id_from_name(self.optuna_study.study_name)


def distribution(parameter: Parameter) -> BaseDistribution:
    """Optuna's form of a parameter."""
    low, high = parameter.low, parameter.high
    if parameter.kind == "choice":
        return CategoricalDistribution(labels(parameter))
    if parameter.kind == "int" or isinstance(parameter.step, int):
        return IntDistribution(int(low), int(high), log=parameter.log, step=int(parameter.step or 1))
    is_log = parameter.kind == "log_uniform"
    return FloatDistribution(float(low), float(high), log=is_log, step=parameter.step)


def labels(parameter: Parameter) -> list[str | int | float]:
    """Optuna's choices are scalars, different from each other; where ours are not, their JSON text is taken."""
    choices = parameter.choices
    if all(type(choice) is type(choices[0]) and isinstance(choice, str | int | float) for choice in choices):
        return list(choices)
    return [json.dumps(choice, sort_keys=True) for choice in choices]


def position(value: Any, choices: Sequence[Any]) -> int:
    """Where a value stands among choices."""
    return [identity(choice) for choice in choices].index(identity(value))

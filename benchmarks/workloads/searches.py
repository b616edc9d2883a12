"""The peers of the replay: random search, and Optuna's TPE as Ray Tune feeds it, with and without Ray's ASHA."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from ray.tune.result import TRAINING_ITERATION
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from workloads.tables import Table

METRIC = "objective"


class RandomSearch:
    """Uniform over the grid, with replacement, after the points `first`; every trial is trained to the end."""

    def __init__(self, table: Table, seed: int, first: Sequence[Mapping[str, Any]] = ()) -> None:
        self.space, self.random, self.first, self.trials = table.space(), random.Random(seed), first, 0

    def next(self) -> tuple[int, Mapping[str, Any]]:
        number, self.trials = self.trials, self.trials + 1
        if number < len(self.first):
            return number, self.first[number]
        return number, {key: self._draw(*raw.items()) for key, raw in self.space.items()}

    def _draw(self, described: tuple[str, list[Any]]) -> Any:
        kind, values = described
        return self.random.choice(values) if kind == "choice" else self.random.randint(*values)

    def report(self, number: int, iteration: int, value: float, seconds: float) -> bool:
        return True


class RaySearch:
    """`OptunaSearch` and a scheduler of Ray Tune, called in the order of `TuneController._process_trial_result` and
    `stop_trial`: the scheduler judges a result first; the searcher hears of it only if the trial goes on; the end of a
    trial is told to both with the last result, and nothing tells the searcher that the scheduler ended it.

    `asha`: settings of Ray's ASHA; None: no scheduler. `first`: the points that are tried first.
    A trial is asked for when its slot is free. (The controller asks for one ahead, which would only be a handicap.)
    """

    def __init__(
        self,
        table: Table,
        seed: int,
        asha: Mapping[str, Any] | None,
        first: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        np.random.seed(seed)  # the scheduler draws a trial's bracket from it
        self.iterations = table.iterations
        self.searcher = OptunaSearch(
            distributions(table), METRIC, table.mode, points_to_evaluate=[dict(point) for point in first], seed=seed
        )
        self.scheduler = (
            FIFOScheduler()
            if asha is None
            else ASHAScheduler(TRAINING_ITERATION, METRIC, table.mode, max_t=table.iterations, **asha)
        )
        self.trials: dict[int, SimpleNamespace] = {}

    def next(self) -> tuple[int, Mapping[str, Any]]:
        number = len(self.trials)
        self.trials[number] = SimpleNamespace(trial_id=str(number))
        params = self.searcher.suggest(str(number))
        self.scheduler.on_trial_add(None, self.trials[number])
        return number, params

    def report(self, number: int, iteration: int, value: float, seconds: float) -> bool:
        trial = self.trials[number]
        result = {METRIC: value, TRAINING_ITERATION: iteration, "time_total_s": seconds}
        # The last iteration is the stopping criterion `training_iteration`, which the controller asks first.
        is_last = iteration == self.iterations
        if not is_last and self.scheduler.on_trial_result(None, trial, result) == TrialScheduler.CONTINUE:
            self.searcher.on_trial_result(trial.trial_id, result)
            return True
        self.scheduler.on_trial_complete(None, trial, result)
        self.searcher.on_trial_complete(trial.trial_id, result)
        return False


def distributions(table: Table) -> dict[str, BaseDistribution]:
    """Those that our search gives Optuna, too."""
    return {
        key: CategoricalDistribution(raw["choice"]) if "choice" in raw else IntDistribution(*raw["int"])
        for key, raw in table.space().items()
    }

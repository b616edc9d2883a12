"""A sampler that does not propose what a trial of the study has had: it would train to the same bits again.

Where all parameters have few values, TPE comes back to the best combination that it knows again and again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState

TRIES = 16
"""Proposals of the second sampler, then uniform ones, after which a repetition is taken: the space may be used up."""


class DistinctSampler(BaseSampler):
    """What `first` proposes; if a trial has had it, the first new one of some proposals of `second`, which spreads
    wider; then of uniform ones.

    Both have the same relative search space. What they don't propose together (the first trials, parameters with
    conditions) comes from `first` and may repeat.
    """

    def __init__(self, first: BaseSampler, second: BaseSampler, seed: int) -> None:
        self._first, self._second, self._uniform = first, second, RandomSampler(seed=seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._first.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        earlier = [other.params for other in study.get_trials(deepcopy=False) if other.number != trial.number]
        proposed = self._first.sample_relative(study, trial, search_space)
        if not _is_repeated(proposed, earlier):
            return proposed
        self._second.infer_relative_search_space(study, trial)  # TPE keeps more of it than it returns
        sources: Sequence[Callable[[], dict[str, Any]]] = (
            lambda: self._second.sample_relative(study, trial, search_space),
            lambda: {
                name: self._uniform.sample_independent(study, trial, name, distribution)
                for name, distribution in search_space.items()
            },
        )
        for source in sources:
            for _ in range(TRIES):
                proposed = source()
                if not _is_repeated(proposed, earlier):
                    return proposed
        return proposed

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._first.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._first.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._first.after_trial(study, trial, state, values)


def _is_repeated(proposed: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a trial with these parameters would be an earlier one: the same conditions hold where all values that are
    active there are proposed here."""
    return any(
        params and all(key in proposed and _is_same(proposed[key], value) for key, value in params.items())
        for params in earlier
    )


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9)  # 0.1 + 2 * 0.1 is told as 0.3
    return bool(one == other)

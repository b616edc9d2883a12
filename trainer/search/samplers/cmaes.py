"""Covariance matrix adaptation (CMA-ES), for a few hundred trials of numbers.

It sees the numbers that every trial has; choices, and parameters under conditions, are drawn at random.
Hansen 2016, The CMA Evolution Strategy: A Tutorial.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

    from trainer.search.study import Setting

REPLAYS_BY_ASKING = True
"""Its state is a pickled optimizer, which is never read from a disk: a replay asks it again."""


@dataclass(frozen=True)
class Config:
    startup: Annotated[int, ">= 1"] = 1
    """Random trials that have to end before the first that is proposed."""
    population: Annotated[int, ">= 2"] | None = None
    """Trials of a generation; null: 4 + 3 log(number of parameters)."""
    pruned: bool = True
    """Learn from pruned trials, too, by their last value."""
    margin: bool = False
    """Keep parameters of few values from settling on one (CMA-ES with margin)."""


def build(config: Config, setting: Setting) -> BaseSampler:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.exceptions import ExperimentalWarning
    from optuna.trial import FrozenTrial

    from trainer.search.study import distribution

    shared = {item.key: distribution(item) for item in setting.space if item.kind != "choice" and not item.when}

    class Sampler(optuna.samplers.CmaEsSampler):
        """Optuna takes the parameters that all trials had so far: with conditions they become fewer in the course of
        a search, and it proposes nothing from then on."""

        def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
            return dict(sorted(shared.items())) if len(shared) > 1 else {}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return Sampler(
            n_startup_trials=config.startup,
            popsize=config.population,
            consider_pruned_trials=config.pruned,
            with_margin=config.margin,
            warn_independent_sampling=False,
            seed=setting.trial_seed,
        )

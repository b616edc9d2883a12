"""Quasi-random search: a low-discrepancy sequence covers the space more evenly than random points."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

    from trainer.search.study import Setting


@dataclass(frozen=True)
class Config:
    sequence: Literal["sobol", "halton"] = "sobol"
    """`sobol` is best at 2, 4, 8, ... trials."""
    scramble: bool = True
    """Shift the sequence at random, by the seed."""


def build(config: Config, setting: Setting) -> BaseSampler:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.exceptions import ExperimentalWarning
    from optuna.trial import FrozenTrial

    from trainer.search.study import distribution

    whole = {parameter.key: distribution(parameter) for parameter in setting.space}

    class Sampler(optuna.samplers.QMCSampler):
        """Optuna takes the parameters of the first trial, which is random. All are known here: a parameter that is not
        active leaves its coordinate out."""

        def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
            return dict(whole)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return Sampler(
            qmc_type=config.sequence,
            scramble=config.scramble,
            seed=setting.seed,  # one sequence for all trials
            independent_sampler=optuna.samplers.RandomSampler(seed=setting.trial_seed),
            warn_asynchronous_seeding=False,
            warn_independent_sampling=False,
        )

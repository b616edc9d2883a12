"""Gaussian process with expected improvement, for few and expensive trials; pruned trials tell it nothing.

Running trials are counted by the improvement expected beside them. Fitting it imports torch.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

    from trainer.search.study import Setting


@dataclass(frozen=True)
class Config:
    startup: Annotated[int, ">= 1"] = 10
    """Random trials that have to finish before the first that is proposed."""
    deterministic: bool = False
    """Take the objective for free of noise."""


def build(config: Config, setting: Setting) -> BaseSampler:
    from optuna.exceptions import ExperimentalWarning
    from optuna.samplers import GPSampler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return GPSampler(
            seed=setting.trial_seed,
            n_startup_trials=config.startup,
            deterministic_objective=config.deterministic,
            warn_independent_sampling=False,
        )

"""Tree-structured Parzen estimator: proposes what is likelier among the good trials than among the others.

Bergstra et al. 2011, Algorithms for Hyper-Parameter Optimization; the multivariate form of Falkner et al. 2018.
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
    startup: Annotated[int, ">= 0"] = 10
    """Random trials before the first that is proposed."""
    candidates: Annotated[int, ">= 1"] = 24
    """Points of which the most promising one is proposed."""
    multivariate: bool | None = None
    """Model the parameters together rather than one by one; null: together where there is one objective."""
    group: bool = False
    """Model the parameters that appear together in a group of their own, for spaces with conditions; needs
    `multivariate`."""
    constant_liar: bool = True
    """Take running trials for bad ones, so that concurrent trials differ."""
    repeats: bool = False
    """Propose what a trial has had, too. Otherwise a space of a finite number of trials, modelled together, gives new
    ones as long as it has them: the same parameters train to the same bits."""

    def __post_init__(self) -> None:
        if self.group and self.multivariate is False:
            raise ValueError("group: needs multivariate")


def build(config: Config, setting: Setting) -> BaseSampler:
    tpe = _tpe(config, setting, config.candidates)
    if config.repeats or setting.space.size() is None:
        return tpe
    from trainer.search.distinct import DistinctSampler

    # One candidate is a draw from the model of the good trials, not the best of many.
    return DistinctSampler(tpe, _tpe(config, setting, candidates=1), setting.trial_seed)


def _tpe(config: Config, setting: Setting, candidates: int) -> BaseSampler:
    from optuna.exceptions import ExperimentalWarning
    from optuna.samplers import TPESampler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # `group`
        return TPESampler(
            n_startup_trials=config.startup,
            n_ei_candidates=candidates,
            multivariate=True if config.group else config.multivariate,
            group=config.group,
            constant_liar=config.constant_liar,
            seed=setting.trial_seed,
        )

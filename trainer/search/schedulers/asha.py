"""Asynchronous successive halving: at each rung (1, 3, 9, ... evaluations) only the best third goes on.

Nobody waits: a trial is compared with those that reached the rung before it, and the first one always passes.
Li et al. 2020, A System for Massively Parallel Hyperparameter Tuning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler

    from trainer.search.pacing import Rhythm

NEEDS_LENGTH = True
"""Rungs are laid out from the number of evaluations of a whole trial."""


@dataclass(frozen=True)
class Config:
    grace: Annotated[int, ">= 1"] = 1
    """Evaluations before a trial can be stopped: the first rung."""
    reduction: Annotated[float, "> 1"] = 3.0
    """Each rung is so many times higher than the one before, and one in so many trials passes it."""
    brackets: Annotated[int, ">= 1"] = 1
    """Sets of rungs, each beginning one rung higher; trials are drawn into them at random."""
    max: Annotated[int, ">= 1"] | None = None
    """Evaluations of a whole trial; null: as the config says."""


def build(config: Config, rhythm: Rhythm) -> TrialScheduler:
    from ray.tune.schedulers import AsyncHyperBandScheduler

    length = rhythm.length(config.max)
    return AsyncHyperBandScheduler(
        time_attr=rhythm.time,
        metric=rhythm.metric,
        mode=rhythm.mode,
        max_t=length,
        grace_period=min(config.grace, length),
        reduction_factor=config.reduction,
        brackets=config.brackets,
        stop_last_trials=False,  # the last rung's trials end by themselves: they are not pruned
    )

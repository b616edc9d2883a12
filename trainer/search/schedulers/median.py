"""Median stopping rule: a trial whose best value is worse than the median of the others' running means is stopped.

Golovin et al. 2017, Google Vizier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler

    from trainer.search.pacing import Rhythm


NEVER = 2**62


@dataclass(frozen=True)
class Config:
    grace: Annotated[int, ">= 1"] = 1
    """Evaluations before a trial can be stopped; earlier ones are left out of the means, too."""
    least_trials: Annotated[int, ">= 1"] = 3
    """Other trials that must have come as far before a trial is compared with them."""


def build(config: Config, rhythm: Rhythm) -> TrialScheduler:
    from ray.tune.schedulers import MedianStoppingRule

    return MedianStoppingRule(
        time_attr=rhythm.time,
        metric=rhythm.metric,
        mode=rhythm.mode,
        grace_period=config.grace,
        min_samples_required=config.least_trials,
        min_time_slice=NEVER,  # never pause a trial to let others catch up
    )

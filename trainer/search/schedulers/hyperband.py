"""HyperBand: brackets of trials that wait for each other at each rung, where the best third goes on.

Brackets trade the number of trials against the length before the first halving. Li et al. 2018.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler

    from trainer.search.pacing import Rhythm

NEEDS_LENGTH = True
PLACES_AHEAD = True
"""All trials have a place in a bracket before the first one starts, or brackets would be halved half-filled."""


@dataclass(frozen=True)
class Config:
    reduction: Annotated[float, "> 1"] = 3.0
    """Each rung is so many times higher than the one before, and one in so many trials passes it."""
    max: Annotated[int, ">= 1"] | None = None
    """Evaluations of a whole trial; null: as the config says."""


def build(config: Config, rhythm: Rhythm) -> TrialScheduler:
    from ray.tune.schedulers import HyperBandScheduler

    return HyperBandScheduler(
        time_attr=rhythm.time,
        metric=rhythm.metric,
        mode=rhythm.mode,
        max_t=rhythm.length(config.max),
        reduction_factor=config.reduction,
        stop_last_trials=False,  # the survivors end by themselves: they are not pruned
    )


def settle(scheduler: TrialScheduler) -> None:
    """After a call, mark all brackets as processed: Ray marks the beginning only, and a bracket whose last missing
    trial fails after the first halving would wait for ever."""
    for band in getattr(scheduler, "_hyperbands", ()):
        for bracket in band:
            if bracket is not None:
                bracket.is_being_processed = False

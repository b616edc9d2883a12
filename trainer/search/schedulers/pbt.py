"""Population based training: bad trials go on from a good one's checkpoint, with its parameters changed a little.

All trials are one population. What may change in the middle of a training is varied only. Jaderberg et al. 2017.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler

    from trainer.search.pacing import Rhythm
    from trainer.search.parameter import Parameter
    from trainer.search.space import Space

PLACES_AHEAD = True
"""Trials that have not begun are members of the population, so that slots are shared in turns."""


@dataclass(frozen=True)
class Config:
    interval: Annotated[int, ">= 1"] = 2
    """Evaluations between two comparisons with the others."""
    burn_in: Annotated[int, ">= 0"] = 0
    """Evaluations before the first one."""
    quantile: Annotated[float, ">= 0", "<= 0.5"] = 0.25
    """So large a part of the population is replaced by as large a part of the best."""
    resample: Annotated[float, ">= 0", "<= 1"] = 0.25
    """Probability that a parameter is drawn anew rather than changed a little."""
    up: Annotated[float, "> 1"] = 1.2
    """Factor by which a number rises; the next choice for choices."""
    down: Annotated[float, "> 0", "< 1"] = 0.8
    """Factor by which it falls."""
    synchronous: bool = False
    """Wait until the whole population has come as far before comparing."""


def build(config: Config, rhythm: Rhythm) -> TrialScheduler:
    from ray.tune.schedulers import PopulationBasedTraining

    return PopulationBasedTraining(
        time_attr=rhythm.time,
        metric=rhythm.metric,
        mode=rhythm.mode,
        perturbation_interval=config.interval,
        burn_in_period=config.burn_in,
        hyperparam_mutations={parameter.key: resampling(parameter) for parameter in rhythm.space},
        quantile_fraction=config.quantile,
        resample_probability=config.resample,
        perturbation_factors=(config.up, config.down),
        custom_explore_fn=lambda params: within(params, rhythm.space),
        log_config=False,
        synch=config.synchronous,
    )


def yields_to_waiting(scheduler: Any) -> bool:
    """A trial pauses after its evaluation where others wait for a slot. One that is being replaced waits as well, but
    has a slot or waits for a checkpoint: pausing for it would cost a restart."""
    return not scheduler._synch


def go_on(scheduler: Any, trial: Any) -> None:
    """The comparison that `trial` was waiting for never came, as in Ray where the last missing trial ends in another
    way than by its report: there is none this time, and all wait for the next one."""
    if scheduler._synch and scheduler._trial_state[trial].last_train_time >= scheduler._next_perturbation_sync:
        live = [state.last_train_time for other, state in scheduler._trial_state.items() if not other.is_finished()]
        scheduler._next_perturbation_sync = max(live) + scheduler._perturbation_interval


def resampling(parameter: Parameter) -> list[Any] | Callable[[], Any]:
    """How Ray draws a value anew: a list to choose from, or a function of the global `random`."""
    if parameter.kind == "choice":
        return list(parameter.choices)
    return lambda: draw(parameter)


def draw(parameter: Parameter) -> Any:
    """A value of a range, on its scale, by the global `random`."""
    low, high = parameter.low, parameter.high
    count = parameter.count()
    if parameter.kind == "log_uniform":
        return parameter.snap(math.exp(random.uniform(math.log(low), math.log(high))))
    if count is None:
        return parameter.snap(random.uniform(low, high))
    if parameter.log:  # each whole number has the width of its rounding
        return parameter.snap(math.exp(random.uniform(math.log(low - 0.5), math.log(high + 0.5))))
    return parameter.at(random.randrange(count))


def within(params: dict[str, Any], space: Space) -> dict[str, Any]:
    """Ray's factors know no bounds and no steps."""
    return {key: value if space[key].kind == "choice" else space[key].snap(value) for key, value in params.items()}

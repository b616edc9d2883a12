"""What the section `tune` asks of itself and of the rest of the config, and the objectives that it gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from trainer.config import RunConfig, Tune
from trainer.errors import UserError
from trainer.layers import Place
from trainer.search.space import Space, SpaceError, read_space
from trainer.search.trying import Try, refused_values

SEVERAL = ("nsgaii", "tpe", "random", "qmc", "grid")
"""Samplers that can look for several objectives at once."""

FOLDED = ("k_fold", "stratified", "grouped", "time_series")
"""Values of `holdout.method` that cut folds."""

_FROM_THE_START = ("model", "data", "recipe", "adapter", "seed", "init_from")
"""What a trial of PBT keeps for good: another trial's weights and place in the data would not fit, or mean the same."""


def tune_problems(config: RunConfig, attempt: Try) -> Iterator[tuple[Place, str]]:
    """(where, what) of everything wrong with the section `tune` of a config whose fields are each right on their own.

    `attempt` tells what is wrong with the config under given overrides.
    """
    tune = config.tune
    yield from _objective_problems(config)
    if tune.cross_validate and tune.scheduler.name == "pbt":
        yield ("tune", "cross_validate"), "a trial of scheduler pbt is one training that goes on: choose asha or none"
    if tune.cross_validate and config.holdout.method not in FOLDED:
        yield (
            ("tune", "cross_validate"),
            f"needs folds: set holdout.method to one of {', '.join(FOLDED)}; it is {config.holdout.method}",
        )
    if not tune.space:
        return
    try:
        space = read_space(tune.space)
    except SpaceError as error:
        yield from ((("tune", "space", key), message) for key, message in error.problems)
        return
    yield from _sampler_problems(tune, space)
    if tune.scheduler.name == "pbt":
        for parameter in space:
            section, _, rest = parameter.key.partition(".")
            if section in _FROM_THE_START or rest == "name" or not rest:
                yield (
                    ("tune", "space", parameter.key),
                    "cannot be varied by scheduler pbt: a trial goes on with another one's weights and data, so only "
                    "what may change within a training can differ (optimizer.lr, ...); choose asha",
                )
    for key, message in refused_values(space, attempt):
        yield ("tune", "space", key), message


def objectives_of(config: RunConfig) -> dict[str, Literal["max", "min"]]:
    """Metric -> `max` or `min`: what a search of this config improves, in order.

    Raises UserError where the config names none.
    """
    if config.tune.objective:
        return dict(config.tune.objective)
    if config.checkpoint.monitor is None:
        raise UserError(
            "no objective: name a metric of the val split, by tune.objective={val/accuracy: max} or by "
            "checkpoint.monitor=val/accuracy (with checkpoint.mode)"
        )
    return {config.checkpoint.monitor: config.checkpoint.mode}


def _objective_problems(config: RunConfig) -> Iterator[tuple[Place, str]]:
    tune, evaluate = config.tune, config.evaluate
    for metric in tune.objective:
        if not metric.startswith("val/") or metric == "val/":
            yield ("tune", "objective", metric), f"got {metric!r}, wanted a metric of the val split, e.g. val/accuracy"
    if tune.objective and evaluate.every_epochs is None and evaluate.every_steps is None:
        yield ("tune", "objective"), "needs evaluate.every_epochs or evaluate.every_steps, or it is never measured"
    if len(tune.objective) > 1:
        if tune.scheduler.name != "none":
            yield (
                ("tune", "scheduler"),
                f"{tune.scheduler.name} compares trials by one number: several objectives need scheduler none",
            )
        if tune.sampler.name not in SEVERAL:
            yield (
                ("tune", "sampler"),
                f"{tune.sampler.name} looks for one objective only: for several, take one of {', '.join(SEVERAL)}",
            )


def _sampler_problems(tune: Tune, space: Space) -> Iterator[tuple[Place, str]]:
    name = tune.sampler.name
    if name == "grid" and tune.sampler.options.get("points") is None:
        for parameter in space:
            if parameter.is_continuous:
                yield (
                    ("tune", "space", parameter.key),
                    f"{parameter.kind} has no end of values, and sampler grid tries all: use quantized or choice, or "
                    "set tune.sampler.points",
                )
    if name == "cmaes":
        numbers = [item.key for item in space if item.kind != "choice" and not item.when]
        if len(numbers) < 2:
            there = f"only {numbers[0]}" if numbers else "none"
            yield (
                ("tune", "sampler"),
                f"cmaes needs two numbers that every trial has, and the space has {there} (choices and keys with "
                "`when` are drawn at random under it): use tpe",
            )

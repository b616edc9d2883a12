"""All combinations, each once, in an order drawn by the seed; a search of fewer trials tries that many of them.

Conditions are kept: parameters that are not active do not multiply the grid.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from trainer.errors import UserError

if TYPE_CHECKING:
    from trainer.search.space import Parameter, Space
    from trainer.search.study import Setting

LARGEST = 100_000
"""Trials of a grid."""


@dataclass(frozen=True)
class Config:
    points: Annotated[int, ">= 2"] | None = None
    """Largest number of values of a range, evenly spaced with both ends; null: all that there are."""


def propose(config: Config, setting: Setting, number: int) -> dict[str, Any]:
    """Parameters of trial `number`; from the beginning again after the last."""
    trials: list[dict[str, Any]] = setting.kept("grid", lambda: grid(config, setting.space, setting.seed))
    return trials[number % len(trials)]


def limit(config: Config, setting: Setting) -> int:
    """Number of different trials."""
    return len(setting.kept("grid", lambda: grid(config, setting.space, setting.seed)))


def grid(config: Config, space: Space, seed: int) -> list[dict[str, Any]]:
    """The trials' parameters, shuffled. Raises UserError where there are too many."""
    found: list[dict[str, Any]] = []
    for params in _combinations(tuple(space), {}, config.points):
        found.append(params)
        if len(found) > LARGEST:
            raise UserError(
                f"tune.sampler: the grid has more than {LARGEST} trials; take fewer points or another sampler"
            )
    random.Random(seed).shuffle(found)
    return found


def _combinations(
    parameters: tuple[Parameter, ...], params: dict[str, Any], points: int | None
) -> Iterator[dict[str, Any]]:
    if not parameters:
        yield params
        return
    first, rest = parameters[0], parameters[1:]
    if not first.is_active(params):
        yield from _combinations(rest, params, points)
        return
    for value in values(first, points):
        yield from _combinations(rest, {**params, first.key: value}, points)


def values(parameter: Parameter, points: int | None) -> list[Any]:
    """Values of a parameter, evenly spaced on its scale: all choices, of a range at most `points`."""
    count = parameter.count()
    if count is not None and (parameter.kind == "choice" or points is None or count <= points):
        return list(parameter.values())
    if points is None:
        raise UserError(
            f"tune.sampler: {parameter.key} has no end of values; set tune.sampler.points, or use quantized"
        )
    if count is not None and not parameter.log:
        return [parameter.at(round(index * (count - 1) / (points - 1))) for index in range(points)]
    low, high = parameter.low, parameter.high
    if parameter.log or parameter.kind == "log_uniform":
        spaced = [low * (high / low) ** (index / (points - 1)) for index in range(points)]
    else:
        spaced = [low + (high - low) * index / (points - 1) for index in range(points)]
    return sorted({parameter.snap(value) for value in [low, *spaced[1:-1], high]})

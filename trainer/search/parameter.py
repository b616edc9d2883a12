"""One parameter of a search space: the values it can take, and when it is there at all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from typing import Any, Literal

from trainer.search.flow_text import flow_text

Kind = Literal["uniform", "log_uniform", "int", "choice", "quantized"]
KINDS: tuple[Kind, ...] = ("uniform", "log_uniform", "int", "choice", "quantized")

_DIGITS = 700
"""Enough for the difference of any two floats, 1e308 and 5e-324 among them, in steps of the latter."""


@dataclass(frozen=True)
class Parameter:
    """A key of the config that is varied. Values are plain YAML values; numbers of a range are within its bounds."""

    key: str
    """Dotted key, e.g. `optimizer.lr`."""
    kind: Kind
    low: float | int = 0
    """Smallest value of a range."""
    high: float | int = 0
    """Largest value of a range; of `quantized`, the last one on the grid."""
    step: float | int | None = None
    """Distance of two neighbours, for `quantized`."""
    log: bool = False
    """Whether an `int` is drawn on a log scale."""
    choices: tuple[Any, ...] = ()
    """The values of `choice`: scalars, lists, mappings."""
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    """(key, values) pairs that must all hold for the parameter to be there."""

    def is_active(self, params: Mapping[str, Any]) -> bool:
        """Whether all conditions hold; one on a parameter that is not there itself does not."""
        return all(
            key in params and identity(params[key]) in {identity(value) for value in values}
            for key, values in self.when
        )

    @property
    def is_continuous(self) -> bool:
        """Whether the values cannot be counted."""
        return self.kind in ("uniform", "log_uniform")

    def count(self) -> int | None:
        """Number of different values; None where they cannot be counted."""
        if self.kind == "choice":
            return len(self.choices)
        if self.kind == "int":
            return int(self.high) - int(self.low) + 1
        if self.kind == "quantized":
            return grid_size(self.low, self.high, self.step or 1)
        return None

    def at(self, index: int) -> Any:
        """The value number `index` (from 0, ascending) of those that can be counted, exact to the decimal."""
        if self.kind == "choice":
            return self.choices[index]
        if self.kind == "int":
            return int(self.low) + index
        assert self.kind == "quantized", f"{self.kind} has no numbered values"
        return grid_value(self.low, self.step or 1, index)

    def values(self) -> Iterator[Any]:
        """All values that can be counted, in order."""
        count = self.count()
        assert count is not None, f"{self.kind} has no numbered values"
        return (self.at(index) for index in range(count))

    def bounds(self) -> tuple[Any, ...]:
        """The values that stand for all: each choice, or the lowest and the highest number."""
        return self.choices if self.kind == "choice" else (self.low, self.high)

    def contains(self, value: Any) -> bool:
        """Whether the parameter can take `value`. A whole float is an int, as 1 is a float; true is no number."""
        if self.kind == "choice":
            return identity(value) in {identity(choice) for choice in self.choices}
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        if not self.low <= value <= self.high:
            return False
        if self.kind == "int":
            return value == int(value)
        if self.kind == "quantized":
            index = nearest_index(self.low, self.step or 1, value)
            return bool(grid_value(self.low, self.step or 1, index) == value)
        return True

    def snap(self, value: float) -> Any:
        """The value that this parameter can take nearest to the number `value`; ranges only."""
        inside = min(max(value, self.low), self.high)
        if self.kind == "int":
            return round(inside)
        if self.kind == "quantized":
            return self.at(nearest_index(self.low, self.step or 1, inside))
        return float(inside)

    def describe(self) -> str:
        """The distribution in words, e.g. `log-uniform 0.0001 to 0.1`."""
        if self.kind == "choice":
            return "one of " + ", ".join(flow_text(choice) for choice in self.choices)
        name = {"uniform": "uniform", "log_uniform": "log-uniform", "int": "whole number", "quantized": "number"}
        between = f"{name[self.kind]} {flow_text(self.low)} to {flow_text(self.high)}"
        if self.kind == "quantized":
            return f"{between} in steps of {flow_text(self.step)}"
        return f"{between}, on a log scale" if self.log else between


def identity(value: Any) -> Any:
    """What two values share that are the same: 1 and 1.0 are, 1 and true or "1" are not. Hashable."""
    if isinstance(value, dict):
        return ("mapping", frozenset((key, identity(item)) for key, item in value.items()))
    if isinstance(value, list | tuple):
        return ("list", tuple(identity(item) for item in value))
    if isinstance(value, bool):
        return ("bool", value)
    return ("number" if isinstance(value, int | float) else "other", value)


def grid_size(low: float, high: float, step: float) -> int:
    """Number of values low, low + step, ... up to `high`, reckoned with the decimals as they are written."""
    with localcontext(prec=_DIGITS):
        return int((_decimal(high) - _decimal(low)) // _decimal(step)) + 1


def grid_value(low: float, step: float, index: int) -> float | int:
    """`low + index * step` of the decimals as they are written: 0.1 * 3 is 0.3; an int where both are."""
    with localcontext(prec=_DIGITS):
        value = _decimal(low) + index * _decimal(step)
    return int(value) if isinstance(low, int) and isinstance(step, int) else float(value)


def nearest_index(low: float, step: float, value: float) -> int:
    """Number of the grid's value that is nearest to `value`."""
    with localcontext(prec=_DIGITS):
        return int(((_decimal(value) - _decimal(low)) / _decimal(step)).to_integral_value(ROUND_HALF_EVEN))


def _decimal(number: float) -> Decimal:
    return Decimal(repr(number))

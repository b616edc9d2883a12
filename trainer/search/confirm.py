"""Which of the best trials is best, once each was trained again with several seeds: means, spread, what can be told.

The best of many trials looks better than it is, since luck was chosen with it; only repeats tell one from the other.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

LEVEL = 0.05
"""Of all comparisons with the best together (Holm)."""


@dataclass(frozen=True)
class Repeated:
    """One trial over its seeds."""

    trial: int
    values: tuple[float, ...]
    """Those that are finite."""
    mean: float
    """NaN without any value."""
    std: float
    """Of the sample (n - 1); NaN for fewer than two values."""


@dataclass(frozen=True)
class Comparison:
    """Another trial against the best."""

    trial: int
    test: Literal["paired t-test", "Welch's t-test", "none"]
    difference: float
    """Mean of the best less the mean of this one; over the shared seeds where the test is paired."""
    p: float
    """Of the test alone; NaN where there is none."""
    p_adjusted: float
    """By Holm, for as many comparisons as there are tests."""
    is_told_apart: bool
    """Whether this trial is worse than the best, at 5 %."""


@dataclass(frozen=True)
class Confirmation:
    """The repeats of the top trials, best mean first."""

    mode: Literal["max", "min"]
    trials: tuple[Repeated, ...]
    comparisons: tuple[Comparison, ...]
    """One for each trial but the best, in the same order."""

    @property
    def best(self) -> int:
        """Number of the trial with the best mean."""
        return self.trials[0].trial

    @property
    def tied(self) -> list[int]:
        """Trials that can't be told apart from the best."""
        return [item.trial for item in self.comparisons if not item.is_told_apart]

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """For `print_table` under `HEAD`."""
        verdicts = {item.trial: _verdict(item) for item in self.comparisons}
        return [
            (
                str(item.trial),
                f"{item.mean:.4f}" if item.values else "-",
                f"{item.std:.4f}" if len(item.values) > 1 else "-",
                str(len(item.values)),
                verdicts.get(item.trial, "best mean"),
            )
            for item in self.trials
        ]

    def conclusion(self) -> str:
        """One sentence."""
        best = self.trials[0]
        if not best.values:
            return "no repeat has ended: nothing can be told"
        if not self.comparisons:
            return f"trial {best.trial} was the only one that was repeated"
        if not self.tied:
            return f"trial {best.trial} is better than the others, at {LEVEL:.0%}"
        names = ", ".join(map(str, self.tied))
        few = "" if min(len(item.values) for item in self.trials) > 1 else ": one seed tells nothing about the spread"
        return f"trial {best.trial} has the best mean, but can't be told apart from {names} at {LEVEL:.0%}{few}"

    def as_dict(self) -> dict[str, Any]:
        """For `--json`; what is not a number is null."""
        return {
            "best": self.best,
            "tied": self.tied,
            "conclusion": self.conclusion(),
            "trials": [
                {"trial": item.trial, "mean": _or_none(item.mean), "std": _or_none(item.std), "values": [*item.values]}
                for item in self.trials
            ],
            "comparisons": [
                {
                    "trial": item.trial,
                    "test": item.test,
                    "difference": _or_none(item.difference),
                    "p": _or_none(item.p),
                    "p_adjusted": _or_none(item.p_adjusted),
                    "is_told_apart": item.is_told_apart,
                }
                for item in self.comparisons
            ],
        }


HEAD = ("trial", "mean", "std", "seeds", "against the best")


def compare(repeats: Mapping[int, Sequence[float]], mode: Literal["max", "min"]) -> Confirmation:
    """Compare repeated trials with the one of the best mean.

    The values of a trial come by seed, in the same order for all; NaN stands for a repeat that failed. Trials of as
    many values share their seeds and are compared by a paired t-test over the seeds that both have, others by Welch's.
    Both are two-sided, since which one is best was read off the same values; Holm's correction (1979) holds for all of
    them together. Fewer than two values on either side tell nothing.
    """
    assert repeats, "nothing to compare"
    sign = 1 if mode == "max" else -1
    rows = [_repeated(trial, values) for trial, values in repeats.items()]
    rows.sort(key=lambda row: (not row.values, -sign * row.mean if row.values else 0.0, row.trial))
    best = rows[0].trial
    tests = [_test(row.trial, repeats[best], repeats[row.trial]) for row in rows[1:]]
    adjusted = holm([test.p for test in tests])
    compared = tuple(
        Comparison(test.trial, test.test, test.difference, test.p, p, p < LEVEL and sign * test.difference > 0)
        for test, p in zip(tests, adjusted, strict=True)
    )
    return Confirmation(mode, tuple(rows), compared)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given; NaN stays, and counts for none."""
    order = sorted((p, place) for place, p in enumerate(values) if not math.isnan(p))
    adjusted = [math.nan] * len(values)
    largest = 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min((len(order) - rank) * p, 1.0))
        adjusted[place] = largest
    return adjusted


def _repeated(trial: int, values: Sequence[float]) -> Repeated:
    finite = tuple(float(value) for value in values if math.isfinite(value))
    mean = statistics.fmean(finite) if finite else math.nan
    return Repeated(trial, finite, mean, statistics.stdev(finite) if len(finite) > 1 else math.nan)


def _test(trial: int, best: Sequence[float], other: Sequence[float]) -> Comparison:
    from scipy import stats

    def result(test: Literal["paired t-test", "Welch's t-test", "none"], difference: float, p: float) -> Comparison:
        return Comparison(trial, test, difference, p, math.nan, False)

    pairs = [(a, b) for a, b in zip(best, other, strict=False) if math.isfinite(a) and math.isfinite(b)]
    left, right = ([value for value in values if math.isfinite(value)] for values in (best, other))
    is_paired = len(best) == len(other)
    if is_paired and len(pairs) > 1:
        left, right = [a for a, _ in pairs], [b for _, b in pairs]
    difference = statistics.fmean(left) - statistics.fmean(right) if left and right else math.nan
    if min(len(left), len(right)) < 2 or (is_paired and len(pairs) < 2):
        return result("none", difference, math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # values that are all the same: scipy answers NaN, see below
        test = stats.ttest_rel(left, right) if is_paired else stats.ttest_ind(left, right, equal_var=False)
    p = float(test.pvalue)
    if math.isnan(p):  # no spread at all: the same numbers each time, or the same difference
        p = 1.0 if difference == 0 else 0.0
    return result("paired t-test" if is_paired else "Welch's t-test", difference, p)


def _verdict(item: Comparison) -> str:
    if item.test == "none":
        return "can't be told apart (fewer than two seeds)"
    p = f"p = {item.p_adjusted:.3f}" if item.p_adjusted >= 0.001 else "p < 0.001"
    if item.is_told_apart:
        return f"worse by {abs(item.difference):.4f} ({p}, {item.test})"
    return f"can't be told apart ({p}, {item.test})"


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None

"""What a trial is worth: from its reports to the values that a search compares."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from trainer.errors import UserError
from trainer.search.trial import FINISHED, Report, Trial

Mode = Literal["max", "min"]


class Objective:
    """Metrics with their directions. `value`: which of a trial's evaluations counts."""

    def __init__(self, modes: Mapping[str, Mode], value: Literal["last", "best"]) -> None:
        self.modes = dict(modes)
        self._value = value

    @property
    def is_single(self) -> bool:
        return len(self.modes) == 1

    @property
    def metric(self) -> str:
        """The first, or only, metric."""
        return next(iter(self.modes))

    @property
    def mode(self) -> Mode:
        return self.modes[self.metric]

    def check(self, metrics: Mapping[str, float]) -> None:
        """Raises UserError where a metric is missing."""
        for metric in self.modes:
            if metric not in metrics:
                there = ", ".join(sorted(metrics)) or "none"
                raise UserError(f"tune.objective: no trial reports {metric!r}; there are: {there}")

    def of(self, metrics: Mapping[str, float]) -> tuple[float, ...]:
        return tuple(float(metrics[metric]) for metric in self.modes)

    def finished(self, trial: Trial, metrics: Mapping[str, float]) -> tuple[float, ...]:
        """Values of a trial that came to its end; `metrics` count where they are all there is, or for several
        objectives. Raises UserError where a metric is missing."""
        if metrics and (not self.is_single or not trial.reports):
            self.check(metrics)
            return self.of(metrics)
        if not trial.reports:
            self.check({})
        if self._value == "best" and self.is_single and not trial.folds:
            values = [report.metrics[self.metric] for report in trial.reports]
            finite = [value for value in values if math.isfinite(value)]
            if finite:
                return (max(finite) if self.mode == "max" else min(finite),)
        return self.of(trial.reports[-1].metrics)

    def pruned(self, trial: Trial) -> tuple[float, ...] | None:
        """Values of a trial that was stopped: of its last report."""
        return self.of(trial.reports[-1].metrics) if trial.reports else None

    def not_a_number(self, values: Sequence[float]) -> str | None:
        """What is wrong with values of which one is not finite."""
        for metric, value in zip(self.modes, values, strict=True):
            if not math.isfinite(value):
                return f"{metric} is not a number: {value}"
        return None

    def best(self, trials: Iterable[Trial]) -> list[Trial]:
        """The finished ones, best first; of several objectives those that no other one beats in all of them."""
        found = [trial for trial in trials if trial.state == FINISHED and trial.values is not None]
        if self.is_single:
            return sorted(found, key=lambda trial: (*self._costs(trial), trial.number))
        return sorted(
            (trial for trial in found if not any(self._dominates(other, trial) for other in found)),
            key=lambda trial: (*self._costs(trial), trial.number),
        )

    def _dominates(self, one: Trial, other: Trial) -> bool:
        pairs = list(zip(self._costs(one), self._costs(other), strict=True))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    def _costs(self, trial: Trial) -> tuple[float, ...]:
        assert trial.values is not None
        signs = (1 if mode == "min" else -1 for mode in self.modes.values())
        return tuple(sign * value for sign, value in zip(signs, trial.values, strict=True))


def mean_so_far(folds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of every metric that all folds have."""
    return {name: sum(fold[name] for fold in folds) / len(folds) for name in folds[0] if all(name in f for f in folds)}


def with_metrics(report: Report, metrics: dict[str, float]) -> Report:
    return Report(report.iteration, report.step, report.epoch, metrics, report.seconds)

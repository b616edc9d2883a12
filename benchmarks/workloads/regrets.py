"""Regrets of several contenders over the same seeds: medians, quartiles, paired intervals, who reached what when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from workloads.replay import Replayed

RESAMPLES = 2000
POINTS = 400
"""Of the time axis, on which the medians of step functions are taken."""


@dataclass(frozen=True)
class Row:
    """One figure of all contenders: a sample per seed, seed i of each on the same table."""

    case: str
    unit: str
    samples: Mapping[str, np.ndarray]
    """By contender, ours first."""

    @property
    def ours(self) -> str:
        return next(iter(self.samples))

    def difference(self, peer: str) -> tuple[float, float, float]:
        """Mean over the seeds of ours − peer, and its 95 % interval (paired bootstrap): below 0, ours is better."""
        differences = self.samples[self.ours] - self.samples[peer]
        means = differences[resamples(len(differences))].mean(axis=1)
        return float(differences.mean()), *(float(bound) for bound in np.quantile(means, (0.025, 0.975)))

    def as_json(self) -> dict[str, Any]:
        medians = {name: float(np.median(values)) for name, values in self.samples.items()}
        return {
            "case": self.case,
            "unit": self.unit,
            "ours": medians.pop(self.ours),
            "peers": medians,
            "differences": {
                peer: dict(zip(("mean", "low", "high"), self.difference(peer), strict=True)) for peer in medians
            },
            "spread": {name: interquartile(values) for name, values in self.samples.items()},
            "rounds": len(self.samples[self.ours]),
            "better": "lower",
        }


def interquartile(values: np.ndarray) -> float:
    """Distance of the quartiles, in the unit of the values (a median regret of 0 has no relative spread)."""
    low, high = np.quantile(values, (0.25, 0.75))
    return float(high - low)


def resamples(seeds: int) -> np.ndarray:
    """Indices of bootstrap samples, shape (RESAMPLES, seeds); always the same ones."""
    return np.random.default_rng(0).integers(seeds, size=(RESAMPLES, seeds))


def curves(replays: Sequence[Replayed], budgets: Sequence[float]) -> np.ndarray:
    """Regrets at even fractions of each seed's budget, shape (seeds, POINTS); infinite before the first report."""
    fractions = np.arange(1, POINTS + 1) / POINTS
    found = [
        [replayed.at(fraction * budget) for fraction in fractions]
        for replayed, budget in zip(replays, budgets, strict=True)
    ]
    return np.nan_to_num(np.array(found), nan=np.inf)


@dataclass(frozen=True)
class Speed:
    """Share of the reference's trial-seconds after which a median regret is as low as the reference's last."""

    share: float
    """Infinite where it never is."""
    low: float
    high: float
    """95 % interval, seeds resampled together."""


def speed(of: np.ndarray, reference: np.ndarray) -> Speed:
    """Both are `curves` of the same seeds and budgets; the reference's time is when its median came there."""

    def share(chosen: np.ndarray | slice) -> float:
        mine, other = np.median(of[chosen], axis=0), np.median(reference[chosen], axis=0)
        reached = np.flatnonzero(mine <= other[-1] + 1e-12)
        if not reached.size:
            return float("inf")
        return float((reached[0] + 1) / (np.flatnonzero(other <= other[-1] + 1e-12)[0] + 1))

    shares = sorted(share(chosen) for chosen in resamples(len(of)))
    return Speed(share(slice(None)), shares[int(0.025 * RESAMPLES)], shares[int(0.975 * RESAMPLES)])

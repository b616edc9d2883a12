"""Evidence that may be looked at after every request: wealth won by betting on the coin that splits the traffic.

The front draws, for each request, which version answers, with a known chance `share` for the new one. If both versions
answer alike, what came of a request says nothing about the draw, and nobody can win by betting on it, whatever load,
machine noise, bursts or heavy tails do to both. So the wealth of a bettor who starts with 1 exceeds 1 / alpha at any
time with a chance of alpha at most (Ville's inequality), and reaching it is evidence at level alpha, however often it
is looked at. The randomness is that of the split alone: no request needs to be independent of another.

- `Difference` bets on inverse-probability-weighted outcomes between 0 and 1, against "the new rate exceeds the old by
  no more than d" (Waudby-Smith & Ramdas 2024, betting; Waudby-Smith, Wu, Ramdas, Karampatziakis & Mineiro 2024,
  off-policy; Lindon & Kallus 2026, design-based).
- `Slowdown` bets on who answered, given the rank of the latency, against "the new version takes no more than g times as
  long" (Lheritier & Cazals 2018 and Podkopaev & Ramdas 2023: sequential prediction as a test).
- `Exceedance` bets against "a share of no more than `limit` of the requests is bad": the likelihood ratio of a mixture
  (Robbins 1970; Howard, Ramdas, McAuliffe & Sekhon 2021), and a second one that begins anew whenever it has lost
  (Shin, Ramdas & Rinaldo 2023, e-detectors), for what goes wrong late.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
FRACTIONS: Floats = np.array([0.05, 0.2, 0.45, 0.9])
"""Of the largest stake that can't ruin the bettor; the wealth is the mean over them."""
TILTS: Floats = np.array([0.2, 0.4, 0.8])
"""How strongly the odds follow the normal score of a latency."""
TAIL_FROM = 0.9
TAILS: Floats = np.array([2.0, 4.0])
"""How much likelier the new version is behind a latency above the quantile `TAIL_FROM`."""
WINDOW = 512
"""Latest latencies of the old version that a new one is ranked among."""
BATCH = 64
"""Observations between two looks at the window: what is bet on one may not depend on itself."""
ALTERNATIVES: Floats = np.array([2.0, 3.0, 5.0, 10.0])
"""Times the limit: the rates that `Exceedance` bets on."""
LASTING, APART, WITHIN = 4, 1.0, 60.0
"""What lasts: as many bad moments, a second apart from one to the next at least, the first no longer ago than this."""


def log_mean(wealth: Floats) -> Floats:
    """Logarithm of the mean of exp(wealth) over the last axis."""
    top = wealth.max(axis=-1, keepdims=True)
    mean: Floats = np.log(np.exp(wealth - top).mean(axis=-1)) + top[..., 0]
    return mean


class Difference:
    """Evidence about `rate of the new version - rate of the old`, for an outcome in [0, 1] that a request may have.

    `grid` are the differences that are tested, ascending, within (-1, 1).
    """

    def __init__(self, grid: Sequence[float]) -> None:
        self.grid: Floats = np.array(sorted(grid))
        self._above: Floats = np.zeros((len(self.grid), len(FRACTIONS)))
        self._below: Floats = np.zeros((len(self.grid), len(FRACTIONS)))
        self._sum = np.zeros(2)
        self._count = np.zeros(2)

    def update(self, outcomes: Floats, is_new: NDArray[np.bool_], share: Floats) -> None:
        """Take a batch, each of shape (B,); `share` is the chance, in (0, 1), that the new version had."""
        if not len(outcomes):
            return
        # What is usual, of the past, narrows the bets; above the share, it would widen the worst that can happen.
        usual = np.minimum(float((self._sum.sum() + 0.01) / (self._count.sum() + 20.0)), share)
        centred = outcomes - usual
        weighted = np.where(is_new, centred / share, -centred / (1.0 - share))
        lowest = np.maximum((1.0 - usual) / (1.0 - share), usual / share)
        highest = np.maximum((1.0 - usual) / share, usual / (1.0 - share))
        self._above += _won(weighted[:, None] - self.grid, lowest[:, None] + self.grid)
        self._below += _won(self.grid - weighted[:, None], highest[:, None] - self.grid)
        for arm, chosen in enumerate((~is_new, is_new)):
            self._sum[arm] += outcomes[chosen].sum()
            self._count[arm] += chosen.sum()

    def against_at_most(self, difference: float) -> float:
        """Log evidence that the difference is larger than this point of the grid."""
        return float(log_mean(self._above)[self._index(difference)])

    def against_at_least(self, difference: float) -> float:
        """Log evidence that the difference is smaller than this point of the grid."""
        return float(log_mean(self._below)[self._index(difference)])

    def interval(self, alpha: float) -> tuple[float, float]:
        """Bounds of the difference, each valid at level `alpha` at any time, to the fineness of the grid."""
        return _bounds(self.grid, log_mean(self._above), log_mean(self._below), alpha, (-1.0, 1.0))

    def rates(self) -> tuple[float | None, float | None]:
        """The old and the new version's observed rate; None without a request."""
        old, new = (float(s / c) if c else None for s, c in zip(self._sum, self._count, strict=True))
        return old, new

    def counts(self) -> tuple[int, int]:
        """Requests of the old and of the new version that were bet on."""
        return int(self._count[0]), int(self._count[1])

    def state(self) -> dict[str, Any]:
        """All of it as JSON."""
        names = {"grid": self.grid, "above": self._above, "below": self._below, "sum": self._sum, "count": self._count}
        return {name: array.tolist() for name, array in names.items()}

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Difference:
        """The inverse of `state`."""
        made = cls(state["grid"])
        made._above, made._below = np.array(state["above"]), np.array(state["below"])
        made._sum, made._count = np.array(state["sum"]), np.array(state["count"])
        return made

    def _index(self, difference: float) -> int:
        return int(np.abs(self.grid - difference).argmin())


class Slowdown:
    """Evidence about `latency of the new version / latency of the old`.

    `grid` are the factors that are tested, ascending. A latency counts as longer only where it is so by more than
    `floor` seconds, too. The comparison is by rank among the old version's latest latencies, so a load that grows, or
    an outlier, changes nothing.
    """

    def __init__(self, grid: Sequence[float], floor: float = 0.0) -> None:
        self.grid: Floats = np.array(sorted(grid))
        self._floor = floor
        bets = len(TILTS) + len(TAILS)
        self._above: Floats = np.zeros((len(self.grid), bets))
        self._below: Floats = np.zeros((len(self.grid), bets))
        self._window: list[float] = []
        self._next = 0

    def update(self, seconds: Floats, is_new: NDArray[np.bool_], share: Floats) -> None:
        """Take latencies in seconds, in the order of their ends; each of shape (B,)."""
        for start in range(0, len(seconds), BATCH):
            part = slice(start, start + BATCH)
            if len(self._window) >= BATCH // 2:
                self._bet(seconds[part], is_new[part], share[part])
            for value in seconds[part][~is_new[part]]:
                self._remember(float(value))

    def _bet(self, seconds: Floats, is_new: NDArray[np.bool_], share: Floats) -> None:
        window = np.sort(np.array(self._window))
        factors = self.grid[:, None]
        scaled = seconds / factors
        fair = np.where(factors > 1.0, np.minimum(scaled, np.maximum(seconds - self._floor, 0.0)), scaled)
        adjusted = np.where(is_new, fair, seconds)  # (G, B)
        low, high = np.searchsorted(window, adjusted, "left"), np.searchsorted(window, adjusted, "right")
        rank = np.asarray((low + high + 1.0) / (2.0 * len(window) + 2.0), dtype=np.float64)  # within (0, 1)
        score = np.clip(_normal_quantile(rank), -2.5, 2.5)[..., None]
        for wealth, sign, position in ((self._above, 1.0, rank), (self._below, -1.0, 1.0 - rank)):
            tilted = np.exp(sign * TILTS * score - TILTS**2 / 2.0)
            tail = np.where(position[..., None] > TAIL_FROM, TAILS, (1.0 - (1.0 - TAIL_FROM) * TAILS) / TAIL_FROM)
            odds = np.concatenate([tilted, tail], axis=-1)  # of the new version being behind it, against the share
            chance = share[:, None]
            gain = np.where(is_new[:, None], odds, 1.0) / (1.0 - chance + chance * odds)
            wealth += np.log(gain).sum(axis=1)

    def _remember(self, value: float) -> None:
        if len(self._window) < WINDOW:
            self._window.append(value)
        else:
            self._window[self._next] = value
            self._next = (self._next + 1) % WINDOW

    def against_at_most(self, factor: float) -> float:
        """Log evidence that the new version takes longer than this factor, a point of the grid."""
        return float(log_mean(self._above)[self._index(factor)])

    def against_at_least(self, factor: float) -> float:
        """Log evidence that the new version takes less than this factor, a point of the grid."""
        return float(log_mean(self._below)[self._index(factor)])

    def interval(self, alpha: float) -> tuple[float, float]:
        """Bounds of the factor, each valid at level `alpha` at any time, to the fineness of the grid."""
        return _bounds(self.grid, log_mean(self._above), log_mean(self._below), alpha, (0.0, float("inf")))

    def state(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            "grid": self.grid.tolist(),
            "floor": self._floor,
            "above": self._above.tolist(),
            "below": self._below.tolist(),
            "window": [round(value, 6) for value in self._window],
            "next": self._next,
        }

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Slowdown:
        """The inverse of `state`."""
        made = cls(state["grid"], state["floor"])
        made._above, made._below = np.array(state["above"]), np.array(state["below"])
        made._window, made._next = list(state["window"]), int(state["next"])
        return made

    def _index(self, factor: float) -> int:
        return int(np.abs(self.grid - factor).argmin())


class Exceedance:
    """Evidence that a larger share than `limit` of one version's requests is bad.

    Other than above, this takes requests to be bad independently of one another, which a burst is not: the caller looks
    at the other version, too, and where that has no traffic, at `lasts`.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        rates = np.minimum(ALTERNATIVES * limit, (1.0 + limit) / 2.0)
        self._bad: Floats = np.log(rates / limit)
        self._good: Floats = np.log((1.0 - rates) / (1.0 - limit))
        self._whole: Floats = np.zeros(len(rates))
        self._recent: Floats = np.zeros(len(rates))
        self.count = 0
        self.bad = 0
        self._bad_at: list[float] = []

    def update(self, bad: NDArray[np.bool_], at: float) -> None:
        """Take a batch of shape (B,), in the order of time; `at` is about its time, in seconds."""
        if not len(bad):
            return
        if bad.any() and (not self._bad_at or abs(at - self._bad_at[-1]) >= APART):
            self._bad_at = [*self._bad_at, at][-LASTING:]
        walk = np.cumsum(np.where(bad[:, None], self._bad, self._good), axis=0)
        self._whole += walk[-1]
        start = np.maximum(self._recent, 0.0)
        deepest = np.minimum(walk[:-1].min(axis=0), -start) if len(bad) > 1 else -start
        self._recent = walk[-1] - deepest
        self.count += len(bad)
        self.bad += int(bad.sum())

    def since_the_start(self) -> float:
        """Log evidence from all requests."""
        return float(log_mean(self._whole))

    def lately(self) -> float:
        """Log evidence from the latest requests, as many as speak most for it; it has no bound over an endless time,
        but needs exp(lately) requests on average to be as high by chance."""
        return float(log_mean(self._recent))

    def lasts(self, at: float) -> bool:
        """Whether it went on for some seconds up to now: one stall of a machine is over sooner."""
        return len(self._bad_at) == LASTING and at - self._bad_at[0] <= WITHIN

    def state(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            "limit": self.limit,
            "whole": self._whole.tolist(),
            "recent": self._recent.tolist(),
            "count": self.count,
            "bad": self.bad,
            "bad_at": self._bad_at,
        }

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Exceedance:
        """The inverse of `state`."""
        made = cls(state["limit"])
        made._whole, made._recent = np.array(state["whole"]), np.array(state["recent"])
        made.count, made.bad, made._bad_at = state["count"], state["bad"], [*state["bad_at"]]
        return made


def _won(gains: Floats, worst: Floats) -> Floats:
    """Log wealth won by staking each fraction of what can't ruin; (B, G) -> (G, fractions)."""
    stakes = FRACTIONS / np.maximum(worst, 1e-3)[..., None]
    return np.asarray(np.log1p(stakes * gains[..., None]).sum(axis=0))


def _bounds(grid: Floats, above: Floats, below: Floats, alpha: float, ends: tuple[float, float]) -> tuple[float, float]:
    needed = -np.log(alpha)
    refuted_low, refuted_high = grid[above >= needed], grid[below >= needed]
    return (
        float(refuted_low.max()) if len(refuted_low) else ends[0],
        float(refuted_high.min()) if len(refuted_high) else ends[1],
    )


def _normal_quantile(chance: Floats) -> Floats:
    """Of the logistic distribution with a normal's spread: near enough for a score, without scipy."""
    return np.asarray(np.log(chance / (1.0 - chance)) / 1.702)

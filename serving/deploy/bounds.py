"""Bounds on a share that hold at every look together, so that looking often is safe."""

from __future__ import annotations

import math

STEPS = 60
"""Of the bisection: far below any share that matters."""


def lower(bad: int, count: int, alpha: float) -> float:
    """The share of bad outcomes is above this, but for a chance of `alpha` over all looks.

    A bet spread evenly over all shares (Beta(1/2, 1/2)) gains against each share that is not the true one; against
    the true one it reaches 1/alpha with a chance of at most alpha, ever (Ville). What it has beaten is ruled out.
    """
    if bad == 0:
        return 0.0
    return _edge(bad, count, alpha, 0.0, bad / count)


def upper(bad: int, count: int, alpha: float) -> float:
    """Likewise from above."""
    return 1.0 - lower(count - bad, count, alpha)


def _edge(bad: int, count: int, alpha: float, ruled_out: float, possible: float) -> float:
    """Between a share that may be ruled out and one that is not: the last that is."""
    if not _is_beaten(ruled_out + 1e-12, bad, count, alpha):
        return ruled_out
    for _ in range(STEPS):
        middle = (ruled_out + possible) / 2
        if _is_beaten(middle, bad, count, alpha):
            ruled_out = middle
        else:
            possible = middle
    return ruled_out


def _is_beaten(share: float, bad: int, count: int, alpha: float) -> bool:
    good = count - bad
    if not 0.0 < share < 1.0:
        return bad > 0 if share <= 0.0 else good > 0
    mixture = _log_beta(bad + 0.5, good + 0.5) - _log_beta(0.5, 0.5)
    return mixture - bad * math.log(share) - good * math.log1p(-share) >= -math.log(alpha)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

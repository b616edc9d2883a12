"""Bounds on a share that hold at every look together, so that looking often is safe."""

from __future__ import annotations

import math

STEPS = 40
"""Of the bisection: far below any share that matters."""


def lower(bad: int, count: int, alpha: float) -> float:
    """The share of bad outcomes is above this, but for a chance of `alpha` over all looks.

    A bet spread evenly over all shares (Beta(1/2, 1/2)) gains against each share that is not the true one; against
    the true one it reaches 1/alpha with a chance of at most alpha, ever (Ville). What it has beaten is ruled out.
    """
    if bad == 0:
        return 0.0
    good = count - bad
    needed = -math.log(alpha) - (_log_beta(bad + 0.5, good + 0.5) - _log_beta(0.5, 0.5))
    ruled_out, possible = 0.0, bad / count
    for _ in range(STEPS):
        middle = (ruled_out + possible) / 2
        likelihood = bad * math.log(middle) + good * math.log1p(-middle)
        if -likelihood >= needed:
            ruled_out = middle
        else:
            possible = middle
    return ruled_out


def upper(bad: int, count: int, alpha: float) -> float:
    """Likewise from above."""
    return 1.0 - lower(count - bad, count, alpha)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

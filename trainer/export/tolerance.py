"""How far a program may be from the run's answers, by the types that both compute in."""

from __future__ import annotations

import math

EXACT = 1e-4
"""Both in fp32: only the order of additions differs."""
BOUNDS = {"float32": EXACT, "float16": 0.02, "bfloat16": 0.05, "int8": 0.2}
"""Largest tolerance by type: of a probability, about what rounding of its type makes of a logit of 10."""
_EVALUATED = {"32": "float32", "16-mixed": "float16", "bf16-mixed": "bfloat16", "bf16": "bfloat16"}
ROOM = 2.0
"""Times the largest deviation that was measured: another machine rounds elsewhere."""


def bound(precision: str, dtype: str) -> float:
    """The largest tolerance of a program with weights in `dtype`, of a run evaluated in `train.precision`."""
    return max(BOUNDS[_EVALUATED[precision]], BOUNDS[dtype])


def tolerance(precision: str, dtype: str, deviation: float) -> float:
    """The tolerance of a program that deviates so much: `EXACT`, or what was measured times `ROOM` up to the bound."""
    most = bound(precision, dtype)
    if most == EXACT or not math.isfinite(deviation):
        return most
    return min(most, max(EXACT, float(f"{ROOM * deviation:.1e}")))

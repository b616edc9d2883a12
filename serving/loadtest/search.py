"""The highest rate within the objectives: steps up until one breaks them, then halving between, then a proof."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from serving.loadtest.measure import Measured
from serving.loadtest.slo import Objectives
from serving.loadtest.summary import Summary, summarise

GROWTH = 1.6
CLOSE = 1.05
"""Ratio of a broken to a held rate at which the search ends."""
BACK = 0.95
MAX_PROOFS = 4
LOWEST = 0.5
"""Requests per second below which nothing is tried."""


@dataclass(frozen=True)
class Step:
    """One rate that was tried."""

    rate: float
    summary: Summary
    broken: tuple[str, ...]
    """Objectives that were not held, in words."""
    measured: Measured

    @property
    def holds(self) -> bool:
        return not self.broken and self.summary.invalid is None


@dataclass(frozen=True)
class Found:
    """What the search came to."""

    best: Step | None
    """The proof: the objectives held at this rate for the whole duration. None where none held."""
    steps: tuple[Step, ...]
    limit: str
    """Why it is not more."""


def find_max(
    first: float,
    objectives: Objectives,
    measure: Callable[[float, bool], Measured],
    tell: Callable[[Step], None],
) -> Found:
    """Look for the highest rate at which the objectives hold.

    Args:
        first: where to begin, requests per second.
        measure: (rate, whether it is a proof, of the whole duration) -> what was measured.
        tell: is told each step.
    """
    steps: list[Step] = []

    def attempt(rate: float, is_proof: bool = False) -> Step:
        measured = measure(rate, is_proof)
        summary = summarise(measured)
        broken = tuple(str(check) for check in objectives.check(summary.measured()) if not check.ok)
        steps.append(Step(rate, summary, broken, measured))
        tell(steps[-1])
        return steps[-1]

    held, worse = _bracket(first, attempt)
    while held and worse and worse.rate / held.rate > CLOSE and not _is_interrupted(steps):
        step = attempt((held.rate * worse.rate) ** 0.5)
        held, worse = (step, worse) if step.holds else (held, step)
    if held is None or _is_interrupted(steps):
        return Found(None, tuple(steps), _limit(worse) if not _is_interrupted(steps) else "interrupted")
    rate = held.rate
    for _ in range(MAX_PROOFS):
        proof = attempt(rate, True)
        if proof.holds:
            return Found(proof, tuple(steps), _limit(worse))
        if proof.summary.interrupted:
            break
        worse, rate = proof, rate * BACK
    return Found(None, tuple(steps), "interrupted" if _is_interrupted(steps) else _limit(worse))


def _bracket(first: float, attempt: Callable[[float], Step]) -> tuple[Step | None, Step | None]:
    """(the highest rate that held, the lowest that did not), of steps up or down from the first."""
    step = attempt(first)
    held, worse = (step, None) if step.holds else (None, step)
    while not step.summary.interrupted:
        if held is None and worse is not None:
            if worse.rate / GROWTH < LOWEST:
                break
            step = attempt(worse.rate / GROWTH)
        elif worse is None and held is not None:
            step = attempt(held.rate * GROWTH)
        else:
            break
        held, worse = (step, worse) if step.holds else (held, step)
    return held, worse


def _is_interrupted(steps: list[Step]) -> bool:
    return steps[-1].summary.interrupted


def _limit(worse: Step | None) -> str:
    if worse is None:
        return ""
    if worse.summary.invalid:
        return (
            f"at {worse.rate:,.4g}/s the generator was the bottleneck ({worse.summary.invalid}): give more --processes"
        )
    return f"at {worse.rate:,.4g}/s: {'; '.join(worse.broken)}"

"""Two versions' counts, and what they allow to be said of the new one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from serving.deploy.bounds import lower, upper

TAIL = 0.05
"""Share of requests that may be slower than p95."""
TESTS = 4


@dataclass
class Counts:
    """Requests of one version since the analysis began."""

    requests: int = 0
    failed: int = 0
    """Answered with 5xx."""
    slower: dict[float, int] = field(default_factory=dict)
    """Seconds (edges of the histogram) -> requests that took longer."""
    timed: int = 0
    """Requests in the histogram."""


@dataclass(frozen=True)
class Limits:
    """When a new version is worse."""

    errors: float = 0.01
    """Largest share of failed requests, whatever the old version does."""
    p95_ms: float = 500.0
    error_margin: float = 0.002
    """Share of requests by which the new version may fail more often than the old."""
    slow_margin: float = 0.02
    """Share of requests by which more may be slower, at any edge of the histogram."""
    alpha: float = 0.01
    """Chance to find an equal version worse, over all looks and tests."""


@dataclass(frozen=True)
class Verdict:
    """What is said, and why."""

    level: Literal["worse", "open"]
    reason: str


def judge(old: Counts, new: Counts, limits: Limits) -> Verdict:
    """The first test that finds the new version worse, or `open`. May be asked as often as one likes."""
    alpha = limits.alpha / TESTS
    for reason in (
        _too_many_errors(new, limits, alpha),
        _too_slow(new, limits, alpha),
        _more_errors(old, new, limits, alpha),
        _slower(old, new, limits, alpha),
    ):
        if reason:
            return Verdict("worse", reason)
    return Verdict("open", f"{new.requests} requests, {new.failed} failed; nothing speaks against it")


def _too_many_errors(new: Counts, limits: Limits, alpha: float) -> str:
    if not new.requests or lower(new.failed, new.requests, alpha) <= limits.errors:
        return ""
    return f"{new.failed} of {new.requests} requests failed; at most {limits.errors:.2%} may"


def _too_slow(new: Counts, limits: Limits, alpha: float) -> str:
    edge = min((edge for edge in new.slower if edge >= limits.p95_ms / 1000), default=None)
    if edge is None or not new.timed or lower(new.slower[edge], new.timed, alpha) <= TAIL:
        return ""
    return f"{new.slower[edge]} of {new.timed} requests took longer than {edge * 1000:g} ms; at most {TAIL:.0%} may"


def _more_errors(old: Counts, new: Counts, limits: Limits, alpha: float) -> str:
    if not _differ((old.failed, old.requests), (new.failed, new.requests), limits.error_margin, alpha):
        return ""
    return f"{_share(new.failed, new.requests)} of its requests failed, {_share(old.failed, old.requests)} of the old's"


def _slower(old: Counts, new: Counts, limits: Limits, alpha: float) -> str:
    """At every edge, each with its part of alpha: which one will show it can't be known before."""
    edges = sorted(set(old.slower) & set(new.slower))
    for edge in edges:
        ours, theirs = (new.slower[edge], new.timed), (old.slower[edge], old.timed)
        if _differ(theirs, ours, limits.slow_margin, alpha / len(edges)):
            return (
                f"{_share(*ours)} of its requests took longer than {edge * 1000:g} ms, {_share(*theirs)} of the old's"
            )
    return ""


def _differ(old: tuple[int, int], new: tuple[int, int], margin: float, alpha: float) -> bool:
    """Whether the new share is above the old one by more than the margin."""
    if not old[1] or not new[1]:
        return False
    return lower(*new, alpha / 2) > upper(*old, alpha / 2) + margin


def _share(bad: int, count: int) -> str:
    return f"{bad / count:.2%}"

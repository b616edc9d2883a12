"""What the evidence allows to be said of a new version: worse, doubtful or fine, test by test, with the figures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from serving.rollout.betting import Difference, Exceedance
from serving.rollout.evidence import LABELS, LATEST, RECENT, TAIL, Evidence
from serving.rollout.plan import Plan

PORTIONS = {
    "errors": 0.35,
    "latency": 0.3,
    "limit_errors": 0.15,
    "limit_p95": 0.1,
    "refusals": 0.04,
    "labels": 0.03,
    "predictions": 0.03,
}
"""How `plan.false_rollbacks` is divided among the tests; together 1."""
DOUBT = math.log(10.0)
"""Log evidence from which on a test that has shown nothing makes the rollout wait."""
LATE = math.log(10_000.0)
"""For what goes wrong late: by chance once in as many requests at the limit itself, and far more seldom below it."""
SURE = 0.05
"""Level of "shown to be no worse"."""
ENOUGH = 50
"""Requests of the old version from which on it is known to be fine."""

Level = Literal["worse", "doubtful", "fine"]


@dataclass(frozen=True)
class Finding:
    """What one test says."""

    test: str
    level: Level
    text: str
    figures: dict[str, Any] = field(default_factory=dict)
    no_worse: bool | None = None
    """Whether it is shown to be within the margin; None where the test does not ask that."""


def judge(plan: Plan, evidence: Evidence, at: float) -> list[Finding]:
    """All findings at the time `at` (of the clock that `Evidence.observe` is given), the worst first."""
    order: dict[Level, int] = {"worse": 0, "doubtful": 1, "fine": 2}
    return sorted(_findings(plan, evidence, at), key=lambda finding: order[finding.level])


def _findings(plan: Plan, evidence: Evidence, at: float) -> Iterator[Finding]:
    yield from _limits(plan, evidence, at)
    yield _rates("errors", "failed", plan.margins.errors, evidence.errors, _alpha(plan, "errors"))
    yield _rates("refusals", "refused", plan.margins.refusals, evidence.refusals, _alpha(plan, "refusals"))
    yield _latency(plan, evidence)
    yield _predictions(plan, evidence)
    if sum(evidence.wrong.counts()):
        yield _rates("labels", "wrong", plan.margins.labels, evidence.wrong, _alpha(plan, "labels"))


def _alpha(plan: Plan, test: str) -> float:
    return plan.false_rollbacks * PORTIONS[test]


def _level(log_evidence: float, alpha: float) -> Level:
    if log_evidence >= -math.log(alpha):
        return "worse"
    return "doubtful" if log_evidence >= DOUBT else "fine"


def _limits(plan: Plan, evidence: Evidence, at: float) -> Iterator[Finding]:
    limits, old = plan.limits, evidence.old
    if evidence.over_errors is not None and limits.errors is not None:
        over = evidence.over_errors
        text = f"{over.bad} of {over.count} requests failed, the limit is {limits.errors:.1%}"
        shares = (old.failed / max(1, old.requests), old.latest_share_failed())
        old_is_fine = len(old.latest_failed) >= ENOUGH and max(shares) <= limits.errors
        alone = evidence.errors.against_at_most(0.0) >= -math.log(_alpha(plan, "limit_errors"))
        yield _limit("limit_errors", plan, over, text, _own(evidence, over.lasts(at), old_is_fine, alone))
    if evidence.over_p95 is not None and limits.p95_ms is not None:
        over, seconds = evidence.over_p95, limits.p95_ms / 1000.0
        text = f"{over.bad} of {over.count} requests took longer than {limits.p95_ms:g} ms, the limit is 5 %"
        shares = (old.share_above(seconds, RECENT), old.share_above(seconds, LATEST))
        old_is_fine = len(old.seconds) >= ENOUGH and max(shares) <= TAIL
        alone = evidence.slow.against_at_most(0.0) >= -math.log(_alpha(plan, "limit_p95"))
        yield _limit("limit_p95", plan, over, text, _own(evidence, over.lasts(at), old_is_fine, alone))


def _own(evidence: Evidence, lasts: bool, old_is_fine: bool, alone: bool) -> str:
    """Empty where the new version breaks a limit by its own doing, as far as can be seen; else what speaks for it."""
    if not evidence.compared:
        return "" if lasts else "it has not lasted yet"
    if alone or (lasts and old_is_fine):
        return ""
    return "the old version may fare no better"


def _limit(test: str, plan: Plan, over: Exceedance, text: str, excuse: str) -> Finding:
    whole, lately = over.since_the_start(), over.lately()
    level: Level = "worse" if lately >= LATE else _level(whole, _alpha(plan, test))
    if excuse and level == "worse":
        level, text = "doubtful", f"{text}; {excuse}"
    return Finding(test, level, text, {"log_evidence": round(whole, 3), "log_evidence_lately": round(lately, 3)})


def _rates(test: str, what: str, margin: float, bets: Difference, alpha: float) -> Finding:
    log_evidence = bets.against_at_most(margin)
    (old, new), (old_count, new_count) = bets.rates(), bets.counts()
    low, high = bets.interval(alpha)
    text = f"{what}: new {_percent(new)} of {new_count}, old {_percent(old)} of {old_count}"
    if low > -1.0 or high < 1.0:
        text += f"; the difference is between {low:+.1%} and {high:+.1%}"
    figures = {
        "old": old,
        "new": new,
        "old_requests": old_count,
        "new_requests": new_count,
        "margin": margin,
        "interval": [low, high],
        "level": alpha,
        "log_evidence": round(log_evidence, 3),
    }
    sure = bets.against_at_least(margin) >= -math.log(SURE) if test == "errors" else None
    return Finding(test, _level(log_evidence, alpha), text, figures, sure)


def _latency(plan: Plan, evidence: Evidence) -> Finding:
    alpha, factor = _alpha(plan, "latency"), 1.0 + plan.margins.latency
    bets = evidence.slowdown
    log_evidence = bets.against_at_most(factor)
    low, high = bets.interval(alpha)
    old, new = evidence.old.p95(), evidence.new.p95()
    text = f"latency: p95 new {_milliseconds(new)}, old {_milliseconds(old)}"
    if low > 0.0 or high < math.inf:
        upper = f"{high:.2f}" if high < math.inf else "any"
        text += f"; the new version takes between {low:.2f} and {upper} times as long"
    figures = {
        "p95_old_ms": _rounded(old),
        "p95_new_ms": _rounded(new),
        "margin": plan.margins.latency,
        "interval": [low, high if high < math.inf else None],
        "level": alpha,
        "log_evidence": round(log_evidence, 3),
    }
    sure = bets.against_at_least(factor) >= -math.log(SURE)
    return Finding("latency", _level(log_evidence, alpha), text, figures, sure)


def _predictions(plan: Plan, evidence: Evidence) -> Finding:
    """The label whose share has changed most surely; the level is divided among all labels and both directions."""
    margin, alpha = plan.margins.predictions, _alpha(plan, "predictions") / (2 * LABELS)
    worst, found = 0.0, None
    for label, bets in evidence.predictions.items():
        log_evidence = max(bets.against_at_most(margin), bets.against_at_least(-margin))
        if found is None or log_evidence > worst:
            worst, found = log_evidence, (label, bets)
    if found is None:
        return Finding("predictions", "fine", "predictions: none seen")
    label, bets = found
    (old, new), counts = bets.rates(), bets.counts()
    text = f"predictions: {label!r} is given by the new version in {_percent(new)}, by the old one in {_percent(old)}"
    figures = {"label": label, "old": old, "new": new, "old_requests": counts[0], "new_requests": counts[1]}
    figures |= {"margin": margin, "level": alpha, "log_evidence": round(worst, 3)}
    return Finding("predictions", _level(worst - math.log(2 * LABELS), _alpha(plan, "predictions")), text, figures)


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.2%}"


def _milliseconds(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{seconds * 1000.0:.1f} ms"


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000.0, 3)

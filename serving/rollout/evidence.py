"""All that a rollout has seen of both versions, and the bets on it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.rollout.betting import Difference, Exceedance, Slowdown
from serving.rollout.plan import Plan

DIFFERENCES = (-0.2, -0.1, -0.05, -0.02, -0.01, -0.005, 0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
FACTORS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 2.0, 3.0)
LABELS = 20
"""Labels that are followed one by one, the first to be seen."""
RECENT = 1000
"""Latencies of each version that its p95 is told from."""
LATEST = 200
"""Requests of the old version that say whether it is over a limit itself."""
TAIL = 0.05
NEVER = 1e9
"""Seconds that stand for no answer."""
LEFT = 499
"""Status of a request whose client has left before the answer was there: it took as long at least."""
NOT_REFUSED = (408, 429)
"""Of the client's making, or of its hurry: neither is the version's refusal."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What came of one request."""

    is_new: bool
    """Which version it was sent to."""
    share: float | None
    """Chance that the new version had in the draw; None where nothing was drawn (header, one version down, retry)."""
    seconds: float
    """Until the version's answer was there."""
    status: int
    """0 where no answer came."""
    label: str | None = None
    """What it predicted, where that is known."""

    @property
    def failed(self) -> bool:
        """No answer, or an error of the server."""
        return self.status == 0 or self.status >= 500

    @property
    def refused(self) -> bool:
        """Not taken by the version."""
        return 400 <= self.status < 500 and self.status not in NOT_REFUSED


class Arm:
    """Plain counts of one version."""

    def __init__(self) -> None:
        self.requests = 0
        self.failed = 0
        self.seconds: deque[float] = deque(maxlen=RECENT)
        self.latest_failed: deque[bool] = deque(maxlen=LATEST)

    def latest_share_failed(self) -> float:
        """Of the latest requests."""
        return sum(self.latest_failed) / max(1, len(self.latest_failed))

    def share_above(self, seconds: float, count: int) -> float:
        """Of the latest `count` answers, at most."""
        latest = list(self.seconds)[-count:]
        return sum(value > seconds for value in latest) / max(1, len(latest))

    def take(self, seen: Sequence[Observation]) -> None:
        for one in seen:
            self.requests += 1
            self.failed += one.failed
            self.latest_failed.append(one.failed)
            if not one.failed:
                self.seconds.append(one.seconds)

    def p95(self) -> float | None:
        """Seconds, of the latest answers."""
        return float(np.quantile(np.array(self.seconds), 0.95)) if self.seconds else None

    def state(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "failed": self.failed,
            "seconds": [round(value, 6) for value in self.seconds],
            "latest_failed": [int(value) for value in self.latest_failed],
        }

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Arm:
        made = cls()
        made.requests, made.failed = state["requests"], state["failed"]
        made.seconds.extend(state["seconds"])
        made.latest_failed.extend(bool(value) for value in state["latest_failed"])
        return made


class Evidence:
    """Counts and bets of one rollout; see `betting` for what they prove."""

    def __init__(self, plan: Plan) -> None:
        margins, limits = plan.margins, plan.limits
        self.old, self.new = Arm(), Arm()
        self.errors = Difference(_grid(DIFFERENCES, margins.errors))
        self.refusals = Difference([margins.refusals])
        self.wrong = Difference(_grid(DIFFERENCES, margins.labels))
        self.slowdown = Slowdown(_grid(FACTORS, 1.0 + margins.latency), margins.latency_ms / 1000.0)
        self.predictions: dict[str, Difference] = {}
        self._margin = margins.predictions
        self.over_errors = Exceedance(limits.errors) if limits.errors is not None else None
        self.over_p95 = Exceedance(TAIL) if limits.p95_ms is not None else None
        self.slow = Difference([0.0])
        """Of requests beyond the p95 limit."""
        self.compared = False
        """Whether both versions had traffic by the draw in the latest batch."""
        self._p95 = limits.p95_ms / 1000.0 if limits.p95_ms is not None else 0.0

    def observe(self, seen: Sequence[Observation], at: float) -> None:
        """Take requests in the order of their ends, which were about `at`, in seconds of any clock."""
        self.old.take([one for one in seen if not one.is_new])
        new = [one for one in seen if one.is_new]
        self.new.take(new)
        if self.over_errors is not None:
            self.over_errors.update(_flags(one.failed for one in new), at)
        if self.over_p95 is not None:
            self.over_p95.update(_flags(one.seconds > self._p95 for one in new if not one.failed), at)
        drawn = [one for one in seen if one.share is not None and 0.0 < one.share < 1.0]
        if seen:
            self.compared = bool(drawn)
        if drawn:
            self._bet(drawn)

    def learn(self, wrong: Sequence[bool], is_new: Sequence[bool], share: Sequence[float]) -> None:
        """Take the labels of earlier requests: whether the prediction was wrong, by which version."""
        self.wrong.update(_numbers(wrong), _flags(is_new), np.array(share))

    def _bet(self, drawn: Sequence[Observation]) -> None:
        is_new, share = _flags(one.is_new for one in drawn), np.array([one.share for one in drawn], dtype=np.float64)
        self.errors.update(_numbers(one.failed for one in drawn), is_new, share)
        self.refusals.update(_numbers(one.refused for one in drawn), is_new, share)
        # All that were drawn count, answered or not: where one version fails more often, what is left of the draw is
        # not fair any more. So a request without its answer counts as the slowest, and as one without a label.
        answered = [200 <= one.status < 300 or one.status == LEFT for one in drawn]
        pairs = list(zip(drawn, answered, strict=True))
        self.slowdown.update(np.array([one.seconds if ok else NEVER for one, ok in pairs]), is_new, share)
        if self.over_p95 is not None:
            self.slow.update(_numbers(ok and one.seconds > self._p95 for one, ok in pairs), is_new, share)
        self._bet_on_labels([one.label for one in drawn], is_new, share)

    def _bet_on_labels(self, labels: list[str | None], is_new: NDArray[np.bool_], share: NDArray[np.float64]) -> None:
        for label, bets in self.predictions.items():
            bets.update(_numbers(given == label for given in labels), is_new, share)
        # Followed from the next batch on: a bet that begins because of what it is on would not be fair.
        for label in filter(None, labels):
            if label not in self.predictions and len(self.predictions) < LABELS:
                self.predictions[label] = Difference([-self._margin, self._margin])

    def state(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            "old": self.old.state(),
            "new": self.new.state(),
            "errors": self.errors.state(),
            "refusals": self.refusals.state(),
            "wrong": self.wrong.state(),
            "slowdown": self.slowdown.state(),
            "slow": self.slow.state(),
            "predictions": {label: bets.state() for label, bets in self.predictions.items()},
            "over_errors": self.over_errors.state() if self.over_errors is not None else None,
            "over_p95": self.over_p95.state() if self.over_p95 is not None else None,
        }

    @classmethod
    def restore(cls, plan: Plan, state: dict[str, Any]) -> Evidence:
        """The inverse of `state`."""
        made = cls(plan)
        made.old, made.new = Arm.restore(state["old"]), Arm.restore(state["new"])
        made.errors, made.refusals = Difference.restore(state["errors"]), Difference.restore(state["refusals"])
        made.wrong, made.slowdown = Difference.restore(state["wrong"]), Slowdown.restore(state["slowdown"])
        made.slow = Difference.restore(state["slow"])
        made.predictions = {label: Difference.restore(bets) for label, bets in state["predictions"].items()}
        if state["over_errors"] is not None:
            made.over_errors = Exceedance.restore(state["over_errors"])
        if state["over_p95"] is not None:
            made.over_p95 = Exceedance.restore(state["over_p95"])
        return made


def _grid(usual: tuple[float, ...], margin: float) -> list[float]:
    return sorted({*usual, margin})


def _flags(values: Iterable[bool]) -> NDArray[np.bool_]:
    return np.array(list(values), dtype=np.bool_)


def _numbers(values: Iterable[bool]) -> NDArray[np.float64]:
    return np.array(list(values), dtype=np.float64)

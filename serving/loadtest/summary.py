"""From records to figures: rates, percentiles, errors, the course over time, and whether the generator kept up."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.loadtest import records
from serving.loadtest.measure import Measured
from serving.loadtest.records import Records

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9, 100.0)
MAX_LAG_SHARE = 0.25
"""Part of the latency that may be the generator's lag."""
LAG_FLOOR_MS = {50.0: 2.0, 99.0: 10.0}
"""Percentile -> lag that is let pass however small the latency is."""
MAX_CPU = 0.9
MIN_BEGUN = 0.99
COURSE_POINTS = 600
"""Intervals of the course at most; each is at least a second."""


@dataclass(frozen=True)
class Summary:
    """The figures of one measurement. Latencies are in milliseconds, from when a request was due."""

    seconds: float
    target_rps: float
    sent: int
    right: int
    errors: Mapping[str, int]
    """How requests without a right answer ended -> how many."""
    examples: Mapping[str, str]
    sent_rps: float
    answered_rps: float
    """Right answers that arrived within the measured time."""
    latency_ms: Mapping[str, float] | None
    """`p50` ... `p99.9`, `max`: of right answers and of requests that timed out. None where there was none."""
    lag_ms: Mapping[str, float]
    cpu: float
    most_in_flight: int
    invalid: str | None
    """Why the figures are the generator's rather than the server's."""
    interrupted: bool

    @property
    def error_rate(self) -> float:
        return 1 - self.right / self.sent if self.sent else 1.0

    def measured(self) -> dict[str, float | None]:
        """The figures that objectives are about, by their names."""
        latency = self.latency_ms or {}
        return {
            **{f"{key}_ms": latency.get(key) for key in ("p50", "p95", "p99")},
            "error_rate": self.error_rate,
            "min_rps": self.answered_rps,
        }

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "error_rate": self.error_rate}


@dataclass(frozen=True)
class Course:
    """Figures by interval, for a plot; NaN where there is none."""

    starts: NDArray[np.float64]
    """Seconds."""
    width: float
    latency_ms: Mapping[str, NDArray[np.float64]]
    """Of the requests that were due in the interval."""
    due_rps: NDArray[np.float64]
    answered_rps: NDArray[np.float64]
    """By when the answer came."""
    failed_rps: NDArray[np.float64]


def summarise(measured: Measured) -> Summary:
    found, seconds = measured.records, max(measured.seconds, 1e-9)
    right = found.is_right
    latency = _percentiles(found.latency[right | (found.end == records.TIMEOUT)])
    lag = _percentiles(found.lag) or {}
    ends = Counter(found.end[~right].tolist())
    in_time = right & (found.due + found.latency <= measured.seconds)
    return Summary(
        seconds=round(measured.seconds, 3),
        target_rps=measured.load.rate,
        sent=len(found.due),
        right=int(right.sum()),
        errors={records.name(end): count for end, count in ends.most_common()},
        examples=dict(measured.examples),
        sent_rps=len(found.due) / seconds,
        answered_rps=int(in_time.sum()) / seconds,
        latency_ms=latency,
        lag_ms=lag,
        cpu=measured.cpu,
        most_in_flight=measured.most_in_flight,
        invalid=_invalid(measured, latency, lag),
        interrupted=measured.interrupted,
    )


def course(found: Records, seconds: float) -> Course:
    """The measurement in intervals of a second, or of more where it was long."""
    width = max(1.0, np.ceil(seconds / COURSE_POINTS))
    count = max(1, int(np.ceil(seconds / width)))
    starts = np.arange(count) * width
    lengths = np.minimum(starts + width, seconds) - starts
    slot = np.minimum((found.due / width).astype(int), count - 1)
    kept = found.is_right | (found.end == records.TIMEOUT)
    latency = {key: np.full(count, np.nan) for key in ("p50", "p95", "p99")}
    for number in range(count):
        values = _percentiles(found.latency[kept & (slot == number)])
        for key in latency if values else ():
            latency[key][number] = values[key] if values else np.nan

    def rate(moments: NDArray[np.float64]) -> NDArray[np.float64]:
        counts, _ = np.histogram(moments, bins=[*starts, starts[-1] + lengths[-1]])
        return np.asarray(counts / lengths, dtype=np.float64)

    ended = found.due + found.latency
    return Course(starts, float(width), latency, rate(found.due), rate(ended[found.is_right]),
                  rate(ended[~found.is_right]))  # fmt: skip


def _percentiles(seconds: NDArray[np.float32]) -> dict[str, float] | None:
    """In milliseconds; each is a value that was measured."""
    if not len(seconds):
        return None
    values = np.sort(seconds.astype(np.float64)) * 1e3
    # Rounded, for 99.9 % of 1,000 is a little more than 999 in floating point.
    ranks = [math.ceil(round(percent / 100 * len(values), 6)) for percent in PERCENTILES]
    names = [f"p{percent:g}" if percent < 100 else "max" for percent in PERCENTILES]
    return {name: float(values[max(rank, 1) - 1]) for name, rank in zip(names, ranks, strict=True)}


def _invalid(measured: Measured, latency: Mapping[str, float] | None, lag: Mapping[str, float]) -> str | None:
    """Why the generator was the bottleneck; None where it was not."""
    begun = 1.0 if measured.interrupted else measured.begun / max(measured.planned, 1)
    if begun < MIN_BEGUN:
        return f"only {begun:.0%} of the requests could be sent"
    if measured.cpu > MAX_CPU:
        return f"a generating process took {measured.cpu:.0%} of a core"
    for percent, floor in LAG_FLOOR_MS.items():
        key = f"p{percent:g}"
        late = lag.get(key, 0.0)
        if late > floor and (latency is None or late > MAX_LAG_SHARE * latency[key]):
            return f"requests were sent {late:.1f} ms late ({key}), which is part of their latency"
    return None

"""The front's own `/metrics`, in Prometheus' text form."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """Counts since the front started."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, str, int]] = Counter()
        self._seconds: dict[tuple[str, str], tuple[list[int], list[float]]] = {}
        self.counts: Counter[tuple[str, str]] = Counter()
        """(name, label) -> count, of `rollout_retries_total` and the like."""
        self.gauges: dict[str, float] = {}

    def request(self, arm: str, version: str, status: int, seconds: float) -> None:
        """Count a request that was sent to a version."""
        self._requests[arm, version, status] += 1
        buckets, total = self._seconds.setdefault((arm, version), ([0] * (len(BUCKETS) + 1), [0.0]))
        buckets[bisect_left(BUCKETS, seconds)] += 1
        total[0] += seconds

    def text(self) -> str:
        """All of it."""
        return "\n".join([*self._lines(), ""])

    def _lines(self) -> Iterator[str]:
        yield "# HELP rollout_requests_total Requests sent to a version; code 0 is no answer."
        yield "# TYPE rollout_requests_total counter"
        for (arm, version, status), count in sorted(self._requests.items()):
            yield f'rollout_requests_total{{arm="{arm}",version="{_quoted(version)}",code="{status}"}} {count}'
        yield "# HELP rollout_request_seconds Time until a version's answer was there."
        yield "# TYPE rollout_request_seconds histogram"
        for (arm, version), (buckets, total) in sorted(self._seconds.items()):
            labels, running = f'arm="{arm}",version="{_quoted(version)}"', 0
            for bound, count in zip((*map(str, BUCKETS), "+Inf"), buckets, strict=True):
                running += count
                yield f'rollout_request_seconds_bucket{{{labels},le="{bound}"}} {running}'
            yield f"rollout_request_seconds_sum{{{labels}}} {total[0]:.6f}"
            yield f"rollout_request_seconds_count{{{labels}}} {running}"
        told = ""
        for (name, label), count in sorted(self.counts.items()):
            if name != told:
                yield f"# TYPE {name} counter"
                told = name
            yield f'{name}{{result="{_quoted(label)}"}} {count}'
        for name, value in sorted(self.gauges.items()):
            yield f"# TYPE {name} gauge"
            yield f"{name} {value:g}"


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

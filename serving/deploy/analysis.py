"""Is a canary worse than the version beside it? Watches both in Prometheus: python -m serving.deploy.analysis --help.

Exits 0 once the canary has been watched for long enough without being worse, 1 as soon as it is worse (or there was
too little traffic to tell), 3 where Prometheus does not answer. One JSON line tells why.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from serving.deploy.verdicts import Counts, Limits, Verdict, judge

ANSWER_SECONDS = 10.0
SILENT_SECONDS = 300.0
"""Prometheus may be away for so long."""
FINE, WORSE, UNKNOWN = 0, 1, 3


@dataclass(frozen=True)
class Watch:
    """What is watched, and for how long."""

    prometheus: str
    model: str
    by: str
    """Label that tells the versions apart."""
    old: str
    new: str
    hold_seconds: float
    minimum_requests: int
    interval_seconds: float
    timeout_seconds: float


@dataclass
class Tally:
    """A counter's growth since the first look, over all its series."""

    last: dict[str, float] = field(default_factory=dict)
    grown: dict[str, float] = field(default_factory=dict)
    begun: bool = False

    def look(self, found: dict[str, float]) -> None:
        """Series -> value now. A value below the last one is a server that began anew; so is a series not seen yet."""
        for series, value in found.items():
            if not self.begun:
                grown = 0.0
            else:
                before = self.last.get(series, 0.0)
                grown = value - before if value >= before else value
            self.grown[series] = self.grown.get(series, 0.0) + grown
            self.last[series] = value
        self.begun = True


class Source:
    """Prometheus, asked for one model's counters."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._requests = {watch.old: Tally(), watch.new: Tally()}
        self._buckets = {watch.old: Tally(), watch.new: Tally()}

    def look(self) -> tuple[Counts, Counts]:
        """Counts of the old and the new version since the first look. Raises OSError or ValueError for no answer."""
        for metric, tallies in (
            ("serving_requests_total", self._requests),
            ("serving_request_seconds_bucket", self._buckets),
        ):
            found = self._query(metric)
            for version, tally in tallies.items():
                tally.look({series: value for series, name, value in found if name == version})
        return self._counts(self._watch.old), self._counts(self._watch.new)

    def _counts(self, version: str) -> Counts:
        counts = Counts()
        for series, grown in self._requests[version].grown.items():
            counts.requests += round(grown)
            if json.loads(series)["code"].startswith("5"):
                counts.failed += round(grown)
        within: dict[float, float] = {}
        for series, grown in self._buckets[version].grown.items():
            edge = float(json.loads(series)["le"])
            within[edge] = within.get(edge, 0.0) + grown
        counts.timed = round(within.get(math.inf, 0.0))
        # A scrape is not atomic: a bucket may be a request ahead.
        counts.slower = {e: max(0, counts.timed - round(n)) for e, n in sorted(within.items()) if e != math.inf}
        return counts

    def _query(self, metric: str) -> list[tuple[str, str, float]]:
        watch = self._watch
        names = "|".join((watch.old, watch.new))
        expression = f'{metric}{{model={json.dumps(watch.model)},{watch.by}=~"{names}"}}'
        url = f"{watch.prometheus.rstrip('/')}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as answer:
            content = json.load(answer)
        if content.get("status") != "success":
            raise ValueError(f"Prometheus: {content.get('error', 'no success')}")
        return [
            (json.dumps(item["metric"], sort_keys=True), item["metric"][watch.by], float(item["value"][1]))
            for item in content["data"]["result"]
        ]


def looks(watch: Watch, source: Source, limits: Limits) -> Iterator[tuple[int | None, Verdict, Counts, Counts]]:
    """One look an interval: the exit code once there is one, the verdict, and the counts it rests on."""
    began = heard = time.monotonic()
    old, new, verdict = Counts(), Counts(), Verdict("open", "nothing seen yet")
    while True:
        now = time.monotonic()
        try:
            old, new = source.look()
            heard = now
            verdict = judge(old, new, limits)
        except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
            if now - heard >= SILENT_SECONDS or now - began >= watch.timeout_seconds:
                yield UNKNOWN, Verdict("open", f"{watch.prometheus} does not answer: {error}"), old, new
                return
        code = _code(watch, verdict, now - began, new)
        yield code, verdict, old, new
        if code is not None:
            return
        time.sleep(watch.interval_seconds)


def _code(watch: Watch, verdict: Verdict, watched: float, new: Counts) -> int | None:
    if verdict.level == "worse":
        return WORSE
    if watched >= watch.hold_seconds and new.requests >= watch.minimum_requests:
        return FINE
    return WORSE if watched >= watch.timeout_seconds else None


def main(arguments: list[str]) -> int:
    """Watch until there is a verdict."""
    parser = argparse.ArgumentParser(prog="python -m serving.deploy.analysis", description=__doc__)
    parser.add_argument("--prometheus", required=True, metavar="URL")
    parser.add_argument("--model", required=True, metavar="NAME")
    parser.add_argument(
        "--by", default="version", metavar="LABEL", help="label that tells the versions apart (version)"
    )
    parser.add_argument("--old", required=True, metavar="VALUE")
    parser.add_argument("--new", required=True, metavar="VALUE")
    parser.add_argument("--hold-seconds", type=float, default=600.0, help="shortest time to watch (600)")
    parser.add_argument("--minimum-requests", type=int, default=500, help="fewest requests of the new one (500)")
    parser.add_argument("--interval-seconds", type=float, default=15.0, help="between two looks (15)")
    parser.add_argument("--timeout-seconds", type=float, default=3600.0, help="longest time to watch (3600)")
    limits = Limits()
    for name, value in asdict(limits).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=value, help=f"({value:g})")
    args = vars(parser.parse_args(arguments))
    limits = Limits(**{name: args.pop(name) for name in asdict(limits)})
    watch = Watch(**args)
    code: int | None = None
    for code, verdict, old, new in looks(watch, Source(watch), limits):
        if code is not None:
            print(json.dumps(_told(watch, code, verdict, old, new)), flush=True)
    return UNKNOWN if code is None else code


def _told(watch: Watch, code: int, verdict: Verdict, old: Counts, new: Counts) -> dict[str, Any]:
    names = {FINE: "fine", WORSE: "worse", UNKNOWN: "unknown"}
    reason = verdict.reason
    if code == WORSE and verdict.level != "worse":
        reason = (
            f"{new.requests} requests in {watch.timeout_seconds:g} s are too few: {watch.minimum_requests} are wanted"
        )
    return {"verdict": names[code], "reason": reason, "old": asdict(old), "new": asdict(new)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The analysis of a canary out of Prometheus' counters: right about bad versions, seldom wrong about equal ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from harness import environment
from processes import wait_until

from serving.deploy.analysis import Tally
from serving.deploy.bounds import lower, upper
from serving.deploy.verdicts import Counts, Limits, judge
from trainer.local_ranks import free_port

EDGES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5)
LOOK = 50
"""Requests between two looks."""


class Version:
    """Draws requests: each fails with a chance, each takes a time around `scale`."""

    def __init__(self, seed: int, errors: float = 0.0, scale: float = 0.03) -> None:
        self.draw = np.random.default_rng(seed)
        self.errors, self.scale = errors, scale
        self.counts = Counts(slower=dict.fromkeys(EDGES, 0))

    def serve(self, requests: int) -> None:
        self.counts.requests += requests
        self.counts.failed += int((self.draw.random(requests) < self.errors).sum())
        seconds = self.scale * self.draw.lognormal(0.0, 0.3, requests)
        self.counts.timed += requests
        for edge in EDGES:
            self.counts.slower[edge] += int((seconds > edge).sum())


def worse_after(old: Version, new: Version, most: int, limits: Limits | None = None) -> tuple[int | None, str]:
    """Requests of the new version until it is found worse, and why; None where it is not."""
    while new.counts.requests < most:
        new.serve(LOOK)
        old.serve(LOOK * 4)
        verdict = judge(old.counts, new.counts, limits or Limits())
        if verdict.level == "worse":
            return new.counts.requests, verdict.reason
    return None, verdict.reason


def test_bounds_hold_the_share_and_close_in_on_it() -> None:
    for bad, count in ((0, 10), (1, 100), (50, 1000), (1000, 1000)):
        assert lower(bad, count, 0.01) <= bad / count <= upper(bad, count, 0.01)
    assert lower(0, 1000, 0.01) == 0.0 and upper(10, 10, 0.01) == 1.0
    assert lower(500, 1000, 0.01) < lower(5000, 10000, 0.01) < 0.5 < upper(5000, 10000, 0.01) < upper(500, 1000, 0.01)
    assert lower(50, 1000, 0.001) < lower(50, 1000, 0.1)


def test_bounds_hold_at_all_looks_together() -> None:
    """A true share is left by the lower bound in at most alpha of the sequences, although each is looked at often."""
    draw, left = np.random.default_rng(0), 0
    for _ in range(400):
        bad = 0
        for count in range(1, 401):
            bad += draw.random() < 0.05
            if count % 20 == 0 and lower(bad, count, 0.05) > 0.05:
                left += 1
                break
    assert left <= 400 * 0.05


def test_equal_versions_are_seldom_found_worse() -> None:
    found = [worse_after(Version(seed, 0.004), Version(1000 + seed, 0.004), 2000)[0] for seed in range(200)]
    assert sum(requests is not None for requests in found) <= 2


@pytest.mark.parametrize(
    ("new", "within", "why"),
    [
        ({"errors": 0.05}, 800, "failed"),
        ({"errors": 1.0}, 50, "failed"),
        ({"scale": 0.06}, 300, "took longer than"),
        ({"scale": 0.039}, 1000, "took longer than"),
        ({"scale": 0.6}, 50, "took longer than 500 ms; at most 5% may"),
    ],
)
def test_worse_versions_are_found(new: dict[str, float], within: int, why: str) -> None:
    for seed in range(10):
        requests, reason = worse_after(Version(seed, 0.001), Version(1000 + seed, **new), 5000)
        assert requests is not None and requests <= within, reason
        assert why in reason


def test_a_version_that_fails_is_found_where_the_old_one_fails_as_well() -> None:
    """Whatever the old one does: an absolute limit."""
    requests, _ = worse_after(Version(1, 0.05), Version(2, 0.05), 2000)
    assert requests is not None
    requests, reason = worse_after(Version(1, 0.002), Version(2, 0.03), 5000, Limits(errors=0.5))
    assert requests is not None and "of the old's" in reason


def test_a_tally_counts_growth_through_restarts_and_new_pods() -> None:
    tally = Tally()
    tally.look({"a": 100.0})
    tally.look({"a": 130.0, "b": 7.0})  # another pod
    tally.look({"a": 5.0, "b": 9.0})  # the first began anew
    tally.look({"b": 9.0})  # and is away
    tally.look({"a": 6.0, "b": 9.0})
    assert tally.grown == {"a": 36.0, "b": 9.0}


def exposition(version: str, requests: int, failed: int) -> str:
    lines = [
        f'serving_requests_total{{model="m",version="{version}",code="200"}} {requests - failed}',
        f'serving_requests_total{{model="m",version="{version}",code="500"}} {failed}',
    ]
    for edge in ("0.1", "0.5", "+Inf"):
        lines.append(f'serving_request_seconds_bucket{{model="m",version="{version}",le="{edge}"}} {requests}')
    return "# TYPE serving_requests_total counter\n" + "\n".join(lines) + "\n"


class Exporter:
    """Two versions' counters, which grow with time: 400 and 100 requests a second."""

    def __init__(self, new_fails: float) -> None:
        self.began = time.monotonic()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                seconds = time.monotonic() - outer.began
                old, new = int(400 * seconds), int(100 * seconds)
                body = exposition("old", old, 0) + exposition("new", new, int(new * new_fails)).partition("\n")[2]
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def prometheus(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a real Prometheus that scrapes an `Exporter` whose new version fails so often."""
    if not shutil.which("prometheus"):
        pytest.skip("prometheus is not installed")
    exporter, port = Exporter(request.param), free_port()
    config = {"scrape_configs": [{"job_name": "m", "static_configs": [{"targets": [f"127.0.0.1:{exporter.port}"]}]}]}
    config["global"] = {"scrape_interval": "1s"}
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = ["prometheus", "--config.file=prometheus.yml", f"--web.listen-address=127.0.0.1:{port}"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--storage.tsdb.path=data"], cwd=tmp_path, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"

        def has_scraped() -> bool:
            import urllib.request

            try:
                with urllib.request.urlopen(f"{url}/api/v1/query?query=serving_requests_total", timeout=5) as answer:
                    return len(json.load(answer)["data"]["result"]) == 4
            except OSError:
                return False

        wait_until(has_scraped, "a scrape", deadline=60, pause=0.2)
        yield url
    finally:
        process.kill()
        process.wait(30)
        exporter.server.shutdown()
        exporter.server.server_close()


def analysis(url: str, *options: str) -> tuple[int, dict[str, Any]]:
    command = [
        sys.executable,
        "-m",
        "serving.deploy.analysis",
        f"--prometheus={url}",
        "--model=m",
        "--old=old",
        "--new=new",
    ]
    command += ["--interval-seconds=0.5", *options]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.stdout.count("\n") == 1, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize("prometheus", [0.0], indirect=True)
def test_an_equal_version_is_fine_once_it_has_been_watched(prometheus: str) -> None:
    code, told = analysis(prometheus, "--hold-seconds=3", "--minimum-requests=200")
    assert (code, told["verdict"]) == (0, "fine"), told
    assert told["new"]["requests"] >= 200 and told["old"]["requests"] > 2 * told["new"]["requests"]
    code, told = analysis(prometheus, "--hold-seconds=1", "--minimum-requests=1000000", "--timeout-seconds=2")
    assert (code, told["verdict"]) == (1, "worse") and "too few" in told["reason"]


@pytest.mark.parametrize("prometheus", [0.05], indirect=True)
def test_a_failing_version_is_found_before_the_time_is_up(prometheus: str) -> None:
    began = time.monotonic()
    code, told = analysis(prometheus, "--hold-seconds=100", "--minimum-requests=200")
    assert (code, told["verdict"]) == (1, "worse") and "failed" in told["reason"], told
    assert time.monotonic() - began < 60


def test_a_prometheus_that_is_away_is_no_verdict() -> None:
    code, told = analysis(f"http://127.0.0.1:{free_port()}", "--timeout-seconds=1")
    assert (code, told["verdict"]) == (3, "unknown") and "does not answer" in told["reason"]

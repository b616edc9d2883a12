"""`trainer loadtest` against servers whose delays and faults are known."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import environment
from known_server import KnownServer, bundle, known_server
from processes import wait_until

Trainer = Callable[..., subprocess.CompletedProcess[str]]
Load = Callable[..., tuple[int, dict[str, Any], str]]
PNG = b"\x89PNG\r\n"


@pytest.fixture
def server() -> Iterator[KnownServer]:
    with known_server() as found:
        yield found


@pytest.fixture
def load(trainer: Trainer, tmp_path: Path) -> Load:
    """`load(url, *options)`: exit code, the JSON object, stderr."""

    def run(url: str, *options: str) -> tuple[int, dict[str, Any], str]:
        done = trainer("loadtest", url, "--json", "--warm-up", "0.5", *options, cwd=tmp_path)
        return done.returncode, json.loads(done.stdout), done.stderr

    return run


def test_a_known_delay_is_measured(server: KnownServer, load: Load, tmp_path: Path) -> None:
    code, found, text = load(f"{server.url}/ok?delay=0.15", "--target-rps", "100", "--duration", "3")
    assert code == 0, text
    assert found["sent"] == found["right"] == pytest.approx(300, abs=70)
    assert found["errors"] == {} and found["invalid"] is None
    assert 150 <= found["latency_ms"]["p50"] < 190  # more on a busy machine
    assert found["answered_rps"] == pytest.approx(100, abs=25)
    assert (tmp_path / "loadtest.png").read_bytes().startswith(PNG)
    assert "latency    p50 1" in text
    assert all("GET /ok?delay=0.15 HTTP/1.1" in head for head in server.headers)


def test_a_stall_shows_in_the_percentiles(server: KnownServer, load: Load) -> None:
    """Half a second in 2.5 without an answer: of the requests, a fifth wait, evenly from nothing to half a second."""
    code, found, text = load(f"{server.url}/stall", "--target-rps", "200", "--duration", "5", "--no-plot")
    assert code == 0, text
    values = found["latency_ms"]
    assert values["p50"] < 60
    assert 150 < values["p90"] < 400  # 250 in theory
    assert 420 < values["p99"] < 650
    # A closed loop would have sent one request a connection into each stall, and have seen it below p99.
    assert found["most_in_flight"] > 60


def test_errors_are_counted_by_kind(server: KnownServer, load: Load) -> None:
    few = ("--target-rps", "40", "--duration", "1.5", "--no-plot", "--timeout", "0.4")
    code, found, _ = load(f"{server.url}/tenth?delay=0.15", *few)
    assert code == 0 and list(found["errors"]) == ["status 500"]
    assert found["error_rate"] == pytest.approx(0.1, abs=0.04)
    assert found["examples"]["status 500"] == '{"error": "every tenth"}'
    for path, kind in (("busy", "status 503"), ("late", "timeout")):
        code, found, text = load(f"{server.url}/{path}", *few)
        assert code == 1 and found["errors"] == {kind: found["sent"]}, text
    # A time-out is a slow answer; it is no shorter than the time that was waited.
    assert found["latency_ms"]["p50"] >= 400


def test_dropped_connections_are_errors(server: KnownServer, load: Load) -> None:
    code, found, text = load(f"{server.url}/drop", "--target-rps", "40", "--duration", "1", "--no-plot")
    assert code == 1 and found["errors"] == {"connection closed": found["sent"]}, text


def test_golden_requests_and_their_answers(server: KnownServer, load: Load, tmp_path: Path) -> None:
    folder = bundle(tmp_path / "bundle")
    for line in (folder / "golden.jsonl").read_text().splitlines():
        entry = json.loads(line)
        server.golden[json.dumps(entry["request"])] = entry["outputs"]
    options = ("--golden", str(folder), "--target-rps", "80", "--duration", "1.5", "--no-plot", "--processes", "2")
    code, found, text = load(f"{server.url}/golden?delay=0.15", *options)
    assert code == 0 and found["errors"] == {}, text
    assert found["sent"] == pytest.approx(120, abs=45)
    code, found, text = load(f"{server.url}/golden?wrong=1&delay=0.15", *options)
    assert code == 0 and list(found["errors"]) == ["wrong answer"], text
    assert found["error_rate"] == pytest.approx(0.25, abs=0.05)
    assert "predictions[0].value[0] is 9.0" in found["examples"]["wrong answer"]


def test_objectives_decide_the_exit_code(server: KnownServer, load: Load, tmp_path: Path) -> None:
    file = tmp_path / "slo.yaml"
    options = ("--target-rps", "50", "--duration", "1", "--slo", str(file), "--plot", "shown.png")
    file.write_text("p95_ms: 2000\nerror_rate: 0\nmin_rps: 20\n")
    code, found, text = load(f"{server.url}/ok?delay=0.15", *options)
    assert code == 0 and all(check["ok"] for check in found["slo"]), text
    file.write_text("p95_ms: 2000\np99_ms: 190\n")
    code, found, text = load(f"{server.url}/ok?delay=0.2", *options)
    assert code == 1 and [check["ok"] for check in found["slo"]] == [True, False]
    assert "BROKEN: p99_ms" in text and (tmp_path / "shown.png").read_bytes().startswith(PNG)


def test_what_the_server_itself_proposes_is_sent(server: KnownServer, load: Load) -> None:
    key = "X-Api-Key: $LOADTEST_KEY"
    os.environ["LOADTEST_KEY"] = "opensesame"
    server.delay = 0.15
    try:
        code, _, text = load(server.url, "--target-rps", "20", "--duration", "1", "--no-plot", "--header", key)
    finally:
        del os.environ["LOADTEST_KEY"]
    assert code == 0, text
    sent = [head for head in server.headers if head.startswith("POST /predict")]
    assert len(sent) > 10
    assert all("content-type: application/json" in head.lower() and "opensesame" in head for head in sent)
    assert "opensesame" not in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("http://127.0.0.1:1/ok",), "nothing answers at http://127.0.0.1:1 (Connection refused)"),
        (("http://no-such-host.invalid/ok",), "nothing answers at http://no-such-host.invalid"),
        (("ftp://host",), "is no http or https URL"),
        (("URL/nowhere",), "is answered with 404"),
        (("URL/hang", "--timeout", "0.2"), "no answer within 0.2 s"),
        (("URL/ok", "--duration", "0"), "--duration: 0.0 won't do"),
        (("URL/ok", "--find-max"), "--find-max needs --slo FILE"),
        (("URL/ok", "--body", "none.json"), "can't be read"),
        (("URL/ok", "--golden", "none"), "there is no such folder"),
        (("URL/ok", "--plot", "none/x.png"), "there is no folder"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], said: str, server: KnownServer, trainer: Trainer, tmp_path: Path
) -> None:
    real = [argument.replace("URL", server.url) for argument in arguments]
    done = trainer("loadtest", *real, "--target-rps", "5", cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert said in done.stderr and len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr


def test_a_generator_that_is_the_bottleneck_says_so(server: KnownServer, load: Load) -> None:
    code, found, text = load(
        f"{server.url}/ok", "--target-rps", "15000", "--duration", "0.4", "--no-plot", "--timeout", "3"
    )
    assert code == 1 and found["invalid"], text
    assert "INVALID    the generator was the bottleneck" in text and "--processes" in text


def start(url: str, folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "trainer", "loadtest", url, "--target-rps", "50", "--duration", "120", *options]
    return subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_an_interrupt_gives_the_report_so_far(server: KnownServer, tmp_path: Path) -> None:
    process = start(f"{server.url}/ok", tmp_path, "--warm-up", "0")
    try:
        wait_until(lambda: server.paths["/ok"] > 60, "sixty requests")
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert "interrupted: the report so far" in stdout and "no error" in stdout and "latency    p50" in stdout
    assert "Traceback" not in stderr


def test_a_generator_ends_with_its_parent(server: KnownServer, tmp_path: Path) -> None:
    process = start(f"{server.url}/ok", tmp_path, "--processes", "2")
    try:
        wait_until(lambda: server.paths["/ok"] > 20, "twenty requests")
        children = psutil.Process(process.pid).children()
        assert len(children) == 2
    finally:
        process.kill()
        process.communicate()
    wait_until(
        lambda: not any(child.is_running() and child.status() != "zombie" for child in children), "their end", 30
    )


def test_the_highest_rate_of_a_real_server_is_found(server: KnownServer, load: Load, tmp_path: Path) -> None:
    """One request at a time, 25 ms each: 40 a second at most, and less with arrivals at random."""
    (tmp_path / "slo.yaml").write_text("p95_ms: 200\nerror_rate: 0.01\n")
    options = ("--find-max", "--slo", "slo.yaml", "--target-rps", "24", "--step-seconds", "1.2", "--duration", "4")
    code, found, text = load(f"{server.url}/slot?delay=0.025", *options, "--timeout", "2")
    assert code == 0, text
    assert 10 < found["max_rps"] < 45
    assert "highest rate within the objectives" in text and "p95_ms" in found["limit"]
    assert (tmp_path / "loadtest.png").exists()

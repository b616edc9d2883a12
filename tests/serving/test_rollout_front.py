"""A front between real servers: bad versions go back soon, good ones are promoted, and no request is lost."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from harness import environment
from processes import wait_until
from rollouts import Clients, Front, front, version
from soak import choose

from serving.errors import Mistake

GENTLE = ("--latency-ms", "20", "--spread", "0.2")
"""Slow enough for a busy machine to add little."""


def steps(*entries: tuple[float, float, int]) -> list[dict[str, Any]]:
    return [{"percent": percent, "seconds": seconds, "requests": count} for percent, seconds, count in entries]


CANARY = {"steps": steps((10, 0.5, 100), (50, 0.5, 100), (100, 0.5, 50)), "limits": {"p95_ms": 5000}}
HELD = {"steps": steps((30, 600, 2000)), "limits": {"p95_ms": 5000}}


def ended(running: Front) -> Callable[[], bool]:
    return lambda: bool(running.decisions("rollback") or running.decisions("promote"))


def told(survived: Callable[[str], None], what: str, line: dict[str, Any]) -> int:
    counts: dict[str, int] = line["figures"]["requests"]
    survived(f"{what}: sent back after {counts['new']} requests to it, {sum(counts.values())} in all")
    return counts["new"]


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["500", "503", "reset"])
def test_five_percent_errors_go_back_within_200_requests_and_nobody_sees_one(
    tmp_path: Path, kind: str, survived: Callable[[str], None]
) -> None:
    bad = ("--errors", "0.05", "--kind", kind, *GENTLE)
    with version("v1", *GENTLE) as old, version("v2", *bad) as new, front(tmp_path / "d", old) as running:
        running.ask("POST", "/start", {"source": new, "plan": {**CANARY, "steps": steps((10, 600, 2000))}})
        clients = Clients(running.url)
        clients.run(ended(running))
        (line,) = running.decisions("rollback")
        assert told(survived, f"5 % errors ({kind})", line) <= 200
        assert line["figures"]["errors"]["interval"][0] > 0
        assert clients.statuses.keys() == {200} and not clients.lost
        assert running.status()["phase"] == "steady"
        assert running.status()["versions"]["old"]["version"] == old


@pytest.mark.soak
def test_thirty_percent_slower_goes_back_within_1000_requests(tmp_path: Path, survived: Callable[[str], None]) -> None:
    options = ("--latency-ms", "60", "--spread", "0.2")
    slow = (*options, "--slower", "1.3")
    with version("v1", *options) as old, version("v2", *slow) as new, front(tmp_path / "d", old) as running:
        running.ask("POST", "/start", {"source": new, "plan": HELD})
        clients = Clients(running.url, count=10)
        clients.run(ended(running), deadline=150.0)
        (line,) = running.decisions("rollback")
        assert line["reason"].partition(": ")[2].startswith("latency")
        assert told(survived, "30 % slower", line) <= 1000
        assert clients.statuses.keys() == {200} and not clients.lost


def test_an_equal_version_is_promoted_and_can_be_taken_back_while_the_old_one_is_warm(tmp_path: Path) -> None:
    with version("v1", *GENTLE) as old, version("v2", *GENTLE) as new, front(tmp_path / "d", old) as running:
        running.ask("POST", "/start", {"source": new, "plan": CANARY})
        clients = Clients(running.url)
        clients.run(ended(running))
        assert [line["weight"] for line in running.decisions("step")] == [0.1, 0.5, 1.0]
        assert running.decisions("promote") and not running.decisions("rollback")
        status = running.status()
        assert status["phase"] == "warm" and status["versions"]["old"]["version"] == new
        assert running.ask("POST", "/rollback") == {"back_to": old}
        clients.run(lambda: clients.statuses.total() > 800)
        assert clients.statuses.keys() == {200} and not clients.lost
        assert running.status()["phase"] == "steady"


def test_blue_green_switches_at_once_and_ends_when_it_is_over(tmp_path: Path) -> None:
    plan = {
        "strategy": "blue-green",
        "steps": steps((100, 0.3, 20)),
        "keep_warm_seconds": 0.5,
        "limits": {"p95_ms": 9e3},
    }
    with version("v1") as old, version("v2") as new, front(tmp_path / "d", old) as running:
        running.ask("POST", "/start", {"source": new, "plan": plan})
        clients = Clients(running.url, 4)
        clients.run(lambda: bool(running.decisions("end")))
        assert running.status()["phase"] == "steady" and running.status()["versions"]["old"]["version"] == new
        assert clients.statuses.keys() == {200} and not clients.lost
        with pytest.raises(Mistake, match="no rollout to promote"):
            running.ask("POST", "/promote")


def test_a_version_that_dies_costs_no_request(tmp_path: Path) -> None:
    plan = {
        "steps": steps((50, 600, 10_000)),
        "limits": {"unready_seconds": 600, "errors": None},
        "margins": {"errors": 0.9},
    }
    with version("v1") as old, version("v2") as new, front(tmp_path / "d", old) as running:
        running.ask("POST", "/start", {"source": new, "plan": plan})
        clients = Clients(running.url, 4)
        clients.run(lambda: clients.arms["new"] > 20)
        kill = subprocess.run(["curl", "--silent", "--max-time", "5", f"{new}/die"], check=False)
        assert kill.returncode != 0
        before = clients.statuses.total()
        clients.run(lambda: clients.statuses.total() > before + 100)
        assert clients.statuses.keys() == {200} and not clients.lost
        wait_until(lambda: not running.status()["versions"].get("new", {}).get("ready"), "the death to be seen", 15)


@pytest.mark.soak
def test_a_killed_front_goes_on_where_it_was(tmp_path: Path) -> None:
    plan = {"steps": steps((10, 0.3, 20), (40, 600, 10_000)), "limits": {"p95_ms": 5000}}
    with version("v1") as old, version("v2") as new, front(tmp_path / "d", old) as running:
        running.ask("POST", "/start", {"source": new, "plan": plan})
        clients = Clients(running.url, 4)
        clients.run(lambda: len(running.decisions("step")) == 2)
        for _ in range(choose(2, 20)):
            clients.run(lambda: saved(running) > 0)
            before = saved(running)
            running.kill()
            running.start(again=True)
            found = running.status()["rollout"]
            assert (found["step"], found["percent"]) == (2, 40.0)
            assert found["requests"]["new"] >= before > 0
            after = Clients(running.url, 4)
            after.run(partial(enough, after))
            assert after.statuses.keys() == {200} and not after.lost and after.arms["new"]


def enough(clients: Clients) -> bool:
    return clients.statuses.total() > 50


def saved(running: Front) -> int:
    """Requests of the new version that the state on disk knows."""
    state = json.loads((running.directory / "state.json").read_bytes())
    count: int = state["rollout"]["evidence"]["new"]["requests"]
    return count


def test_a_second_front_is_refused(tmp_path: Path) -> None:
    with version("v1") as old, front(tmp_path / "d", old) as running:
        line = [sys.executable, "-m", "serving.rollout", str(running.directory)]
        second = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=60)
        assert second.returncode == 2
        assert f"a front is running on it (process {running.pid})" in second.stderr


def test_headers_keys_ids_deadlines_and_streams_pass_through(tmp_path: Path) -> None:
    split = {"sticky": "header:X-User", "header": "X-Beta: yes"}
    plan = {"steps": steps((50, 600, 10_000)), "split": split, "limits": {"p95_ms": 5000}}
    with version("v1") as old, version("v2") as new, front(tmp_path / "d", old) as running:
        running.ask("POST", "/start", {"source": new, "plan": plan})
        wait_until(lambda: "rollout" in running.status() and running.status()["rollout"]["step"] == 1, "step 1")

        async def check() -> None:
            async with aiohttp.ClientSession() as session:
                await check_splits(session, running.url)
                await check_passing(session, running.url)

        asyncio.run(check())


async def check_splits(session: aiohttp.ClientSession, url: str) -> None:
    async def arm(**headers: str) -> str:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        async with session.post(f"{url}/predict", json={"instances": [0]}, headers=given) as answer:
            assert answer.status == 200
            assert answer.headers["X-Model-Version"] == {"old": "v1", "new": "v2"}[answer.headers["X-Rollout-Arm"]]
            return answer.headers["X-Rollout-Arm"]

    assert {await arm(X_Model_Version="new") for _ in range(5)} == {"new"}
    assert {await arm(X_Model_Version="old") for _ in range(5)} == {"old"}
    assert {await arm(X_Beta="yes") for _ in range(5)} == {"new"}
    users = {str(number): {await arm(X_User=str(number)) for _ in range(3)} for number in range(20)}
    assert all(len(arms) == 1 for arms in users.values())
    assert {"old"} in users.values() and {"new"} in users.values()


async def check_passing(session: aiohttp.ClientSession, url: str) -> None:
    given = {"X-Request-Id": "mine-1", "X-Deadline-Ms": "5000"}
    async with session.post(f"{url}/predict", json={"instances": [1]}, headers=given) as answer:
        seen = (await answer.json())["seen"]
        assert seen["X-Request-Id"] == answer.headers["X-Request-Id"] == "mine-1"
        assert 4000 <= int(seen["X-Deadline-Ms"]) <= 5000 and seen["X-Forwarded-For"] == "127.0.0.1"
    async with session.post(f"{url}/predict", json={"instances": [1]}, headers={"X-Deadline-Ms": "1"}) as answer:
        assert answer.status in (200, 504)
    async with session.post(f"{url}/predict", json={"instances": [1]}) as answer:
        assert len(answer.headers["X-Request-Id"]) == 32

    async def pieces() -> Any:
        for _ in range(3):
            yield b"x" * 700_000

    async with session.post(f"{url}/stream", data=pieces()) as answer:
        begun = time.monotonic()
        first = await answer.content.readany()
        early = time.monotonic()
        rest = await answer.content.read()
        assert (first + rest).count(b"data: ") == 10 and time.monotonic() - early > 0.1 > early - begun - 5.0
    async with session.post(f"{url}/predict", data=b"x" * (17 << 20)) as answer:
        assert answer.status == 413 and (await answer.json())["error"]["code"] == "too_large"
    async with session.get(f"{url}/metrics") as answer:
        text = await answer.text()
        assert 'rollout_requests_total{arm="new"' in text and "rollout_weight 0.5" in text
    async with session.post(f"{url}/v2/repository/models/m/load") as answer:
        assert answer.status == 403 and isinstance((await answer.json())["error"], str)


def test_a_shadow_is_compared_and_hurts_nobody(tmp_path: Path) -> None:
    plan = {"strategy": "shadow", "steps": steps((0, 0.5, 40)), "margins": {"errors": 0.9}, "limits": {"errors": None}}
    # Not more errors: they count as answers that take for ever, and a tenth of those is slower than any margin.
    bad = ("--errors", "0.05", "--latency-ms", "40", "--label", "owl")
    lenient = {**plan, "margins": {"errors": 0.9, "latency": 99.0, "predictions": 0.99}}
    with version("v1") as old, version("v2", *bad) as new, front(tmp_path / "d", old) as running:
        running.ask("POST", "/start", {"source": new, "plan": lenient})
        clients = Clients(running.url, 4)
        kinds = ("same", "other_label", "other_status")
        clients.run(lambda: all(running.status()["rollout"]["shadowed"].get(kind) for kind in kinds))
        clients.run(lambda: any("waits for word" in line["reason"] for line in running.decisions("hold")))
        assert clients.statuses.keys() == {200} and clients.arms.keys() == {"old"} and not clients.lost
        running.ask("POST", "/promote")
        clients.run(lambda: clients.arms["old"] > 10)
        assert running.status()["versions"]["old"]["version"] == new


def test_a_b_logs_assignments_and_labels_decide(tmp_path: Path) -> None:
    plan = {
        "strategy": "ab",
        "steps": steps((50, 600, 10_000)),
        "split": {"sticky": "header:X-User"},
        "margins": {"predictions": 0.99},
        "limits": {"p95_ms": 5000},
    }
    wrong = ("--label", "owl")  # always: a third is right
    with version("v1") as old, version("v2", *wrong) as new, front(tmp_path / "d", old) as running:
        running.ask("POST", "/start", {"source": new, "plan": plan})
        wait_until(lambda: running.status()["rollout"]["step"] == 1, "the first step")
        clients = Clients(running.url, 4)

        def headers(number: int) -> dict[str, str]:
            return {"X-User": str(number), "X-Request-Id": f"r{number}"}

        clients.run(lambda: clients.statuses.total() > 400, headers)
        path = running.directory / "assignments.jsonl"
        wait_until(lambda: len(path.read_text().splitlines()) >= clients.statuses.total(), "the log", 10)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert {line["arm"] for line in lines} == {"old", "new"} and all(line["key"] for line in lines)
        labels = ("cat", "dog", "owl")
        right = [{"request_id": line["request_id"], "label": labels[int(line["request_id"][1:]) % 3]} for line in lines]
        assert running.ask("POST", "/labels", right) == {"taken": len(lines), "unknown": 0}
        assert running.ask("POST", "/labels", right[0]) == {"taken": 0, "unknown": 1}
        wait_until(lambda: running.decisions("rollback"), "the rollback", 10)
        assert "wrong: new " in running.decisions("rollback")[0]["reason"]


def test_golden_requests_keep_a_version_out(tmp_path: Path) -> None:
    golden = tmp_path / "golden.jsonl"
    case = {"request": 0, "prediction": {"label": "cat", "index": 0, "score": 0.9}}
    golden.write_text(json.dumps(case) + "\n")
    plan = {**CANARY, "golden_file": str(golden)}
    with version("v1") as old, version("v2", "--label", "owl") as new, front(tmp_path / "d", old) as running:
        running.ask("POST", "/start", {"source": new, "plan": plan})
        wait_until(lambda: running.decisions("rollback"), "the rollback", 20)
        assert "golden requests: number 0 deviates" in running.decisions("rollback")[0]["reason"]
        assert not running.decisions("step")
        with pytest.raises(Mistake, match="can't be read"):
            running.ask("POST", "/start", {"source": new, "plan": {"golden_file": str(tmp_path / "none")}})


def test_a_front_that_is_told_to_stop_answers_what_it_has_accepted(tmp_path: Path) -> None:
    with version("v1", "--latency-ms", "400", "--spread", "0") as old, front(tmp_path / "d", old) as running:
        with socket.create_connection(("127.0.0.1", running.port), timeout=20) as client:
            body = json.dumps({"instances": [1]}).encode()
            head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            client.sendall(f"{head}\r\n\r\n".encode() + body)
            wait_until(lambda: requests_of(old) == 1, "the request to arrive", 10, 0.01)
            os.kill(running.pid, signal.SIGTERM)
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
        assert running.stop() == 0


def requests_of(url: str) -> int:
    with urllib.request.urlopen(f"{url}/count", timeout=5) as answer:
        count: int = json.load(answer)["requests"]
        return count

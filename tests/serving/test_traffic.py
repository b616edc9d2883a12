"""Hours of traffic in minutes: nothing is lost, memory and latency stay; killed workers cost what they held."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import front_bundles
import numpy as np
import psutil
import pytest
import soak
import traffic
from front_server import FrontServer
from processes import wait_until
from traffic import Asked, Outcome

SECONDS = soak.choose(12.0, 600.0)
CLIENTS = 8
KILLS = soak.choose(3, 120)
SECONDS_BETWEEN_KILLS = soak.choose(1.0, 5.0)
RELOADS = soak.choose(4, 1000)
MAX_BATCH = 8
MEGABYTE = 1 << 20


@pytest.fixture
def server(front_folders: Path, tmp_path: Path) -> Iterator[FrontServer]:
    """Two workers for each of two models, with everything on that costs memory: log, metrics, checks."""
    options = ["--workers", "2", "--max-batch", str(MAX_BATCH), "--request-log", "requests.jsonl"]
    server = FrontServer(tmp_path / "server", front_folders / "digits", front_folders / "photos", *options)
    yield server
    server.close()


def _asked() -> list[Asked]:
    """Good ones of several kinds and sizes, with bad ones among them."""
    draw = np.random.default_rng(0)
    pictures = draw.integers(0, 256, (5, 8, 8)).tolist()
    photo = front_bundles.encoded(draw.integers(0, 256, (60, 80, 3)).astype(np.uint8))
    good = [
        Asked(traffic.request("/predict", json.dumps({"instances": pictures[:count]}).encode()), 200, b'"label"')
        for count in (1, 1, 5)
    ]
    good.append(Asked(traffic.request("/models/photos/predict", photo, "image/jpeg"), 200, b'"label"'))
    bad = [
        Asked(traffic.request("/predict", b'{"instances": [[[1, 2]]]}'), 400, b"instances[0]"),
        Asked(traffic.request("/predict", b"{"), 400, b"JSON"),
        Asked(traffic.request("/models/photos/predict", photo[:100], "image/jpeg"), 422),
        Asked(traffic.request("/nowhere", b"{}"), 404),
    ]
    return good * 5 + bad


async def _clients(server: FrontServer, goes_on: Callable[[], bool], outcome: Outcome) -> None:
    asked = _asked()
    await asyncio.gather(*(traffic.client(server.port, asked, 3 * n, outcome, goes_on) for n in range(CLIENTS)))


def _memory(server: FrontServer) -> float:
    """MB of the server and its workers, shared pages counted once."""
    front = psutil.Process(server.process.pid)
    return sum(process.memory_full_info().pss for process in [front, *front.children(recursive=True)]) / MEGABYTE


@pytest.mark.soak
@pytest.mark.timeout(soak.choose(300, 3000))
def test_traffic_leaves_nothing_behind(server: FrontServer, survived: Callable[[str], None]) -> None:
    async def test() -> tuple[Outcome, list[float]]:
        outcome, sizes = Outcome(), []
        begun = time.monotonic()
        load = asyncio.create_task(_clients(server, lambda: time.monotonic() < begun + SECONDS, outcome))
        for part in range(1, 5):
            while time.monotonic() < begun + SECONDS * part / 4 - 1:
                await asyncio.sleep(0.1)
                assert not load.done() or load.result() is None
            sizes.append(_memory(server))
        await load
        assert not outcome.wrong and not outcome.counts["503"], outcome.counts
        early, late = (outcome.p99(begun + SECONDS * a / 4, begun + SECONDS * (a + 1) / 4) for a in (0, 3))
        figures = f"p99 {early * 1e3:.1f} -> {late * 1e3:.1f} ms, memory {sizes[0]:.0f} -> {sizes[-1]:.0f} MB"
        survived(f"{len(outcome.latencies)} requests in {SECONDS:.0f} s: all answered, {figures}")
        return outcome, [*sizes, early, late]

    outcome, (first, *_, last, early, late) = asyncio.run(test())
    assert len(outcome.latencies) > 100 * SECONDS
    assert last - first < soak.choose(40, 20), "MB; buffers and caches fill at first"
    if soak.IN_FULL:
        assert late < 2 * early + 0.005
    server.stop()
    logged = sum(file.read_bytes().count(b"\n") for file in server.log.parent.glob("requests.jsonl*"))
    assert logged >= len(outcome.latencies)


@pytest.mark.soak
@pytest.mark.timeout(soak.choose(300, 3000))
def test_killed_workers_lose_what_they_held_and_it_is_503(server: FrontServer, survived: Callable[[str], None]) -> None:
    draw = soak.draw()
    front = psutil.Process(server.process.pid)

    def workers() -> list[int]:
        """Those of both models: children of the server, as is the zygote that they were forked from, which is older."""
        _, *younger = sorted(front.children(), key=lambda child: child.create_time())
        return [child.pid for child in younger]

    async def test() -> Outcome:
        outcome, going = Outcome(), [True]
        load = asyncio.create_task(_clients(server, lambda: bool(going), outcome))
        for _ in range(KILLS):
            await asyncio.sleep(SECONDS_BETWEEN_KILLS * (0.5 + draw.random()))
            os.kill(draw.choice(workers()), signal.SIGKILL)
        await asyncio.sleep(SECONDS_BETWEEN_KILLS)
        going.clear()
        await load
        return outcome

    outcome = asyncio.run(test())
    lost = outcome.counts["503"]
    survived(f"{KILLS} workers killed under traffic: {len(outcome.latencies)} requests, {lost} of them got a 503")
    assert not outcome.wrong, outcome.counts
    assert lost <= KILLS * MAX_BATCH, "no more than a batch for each kill"
    assert all(b"\r\nretry-after: " in head.lower() for head in outcome.refusals)
    wait_until(lambda: server.ask("GET", "/ready").status == 200, "the last worker", 60)


@pytest.mark.soak
@pytest.mark.timeout(soak.choose(300, 3000))
def test_reloads_over_http_under_traffic(server: FrontServer, survived: Callable[[str], None]) -> None:
    async def test() -> Outcome:
        outcome, going, loop = Outcome(), [True], asyncio.get_running_loop()
        load = asyncio.create_task(_clients(server, lambda: bool(going), outcome))
        for _ in range(RELOADS):
            answer = await loop.run_in_executor(None, server.ask, "POST", "/v2/repository/models/digits/load")
            assert answer.status == 200, answer
        going.clear()
        await load
        return outcome

    outcome = asyncio.run(test())
    survived(f"{RELOADS} reloads over HTTP: {len(outcome.latencies)} requests, all answered")
    assert not outcome.wrong and not outcome.counts["503"], outcome.counts
    assert server.metric('serving_reloads_total{result="done"}') == RELOADS

"""Processes that are killed, hang, or never come up: only what they held is lost, and it is said at once."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import soak
import summing
from harness import FIXTURES, environment
from processes import wait_until
from summing import Told, ask, children, pids, serving, until

from serving.errors import ServingError
from serving.workers.errors import WorkerLost
from serving.workers.model import ServedModel
from serving.workers.nursery import Nursery

KILLS = soak.choose(6, 200)


def test_a_killed_worker_loses_what_it_ran_and_nothing_else(nursery: Nursery, versions: list[Path]) -> None:
    async def test() -> None:
        told = Told()
        async with serving(nursery, versions[0], told, max_batch=2) as model:
            assert await ask(model, 1) == 1.0
            (pid,) = pids(model)
            os.kill(pid, signal.SIGSTOP)
            tasks = [asyncio.create_task(ask(model, n)) for n in range(8)]
            await until(lambda: model.state.queue_length == 4, "two batches with the worker")
            begun = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(result) for result in results[:2]] == [WorkerLost] * 2, "they were in the batch that ran"
            assert results[2:] == [2, 3, 4, 5, 6, 7], "the next batch had not been begun, and the rest waited"
            assert time.monotonic() - begun < 60
            await until(lambda: model.state.ready and model.state.restarts == 1, "the new worker")
            assert pids(model) != [pid]
            assert ("lost", f"process {pid}: SIGKILL, which may be the system short of memory") in told.events

    asyncio.run(test())


def test_while_one_is_missing_the_others_go_on(nursery: Nursery, versions: list[Path]) -> None:
    async def test() -> None:
        async with serving(nursery, versions[0], workers=2) as model:
            first, second = pids(model)
            os.kill(nursery.pid or 0, signal.SIGSTOP)  # so that it stays away for a while
            try:
                os.kill(first, signal.SIGKILL)
                await until(lambda: not model.state.ready, "the loss")
                assert model.state.reason == "summing: 1 of 2 workers restarting"
                assert model.state.workers_up == 1 and await ask(model, 5) == 5.0
            finally:
                os.kill(nursery.pid or 0, signal.SIGCONT)
            await until(lambda: model.state.ready, "the new worker")
            assert second in pids(model) and len(pids(model)) == 2

    asyncio.run(test())


def test_kills_at_random_moments_under_load(nursery: Nursery, versions: list[Path]) -> None:
    draw = soak.draw()

    async def client(model: ServedModel, number: int, outcomes: Counter[str], going: list[bool]) -> None:
        while going:
            try:
                assert await ask(model, number) == number
                outcomes["answered"] += 1
            except WorkerLost:
                outcomes["lost"] += 1
            await asyncio.sleep(0)

    async def test() -> None:
        told, outcomes, going = Told(), Counter[str](), [True]
        async with serving(nursery, versions[0], told, workers=2, max_batch=4) as model:
            clients = [asyncio.create_task(client(model, n, outcomes, going)) for n in range(16)]
            for count in range(KILLS):
                await until(lambda: model.state.ready, "both workers")
                answered = outcomes["answered"]
                await until(lambda before=answered: outcomes["answered"] > before + 50, "answers")
                await asyncio.sleep(draw.random() * 0.05)
                os.kill(draw.choice(pids(model)), signal.SIGKILL)
                await until(lambda n=count + 1: told.count("lost") == n, "the loss")
                assert outcomes["lost"] <= (count + 1) * 4, "no more than one batch for each kill"
            going.clear()
            await asyncio.gather(*clients)
            await until(lambda: model.state.ready and model.state.restarts == KILLS, "both workers")
            assert model.state.outstanding == 0

    asyncio.run(test())


def test_a_worker_that_hangs_is_replaced(nursery: Nursery, versions: list[Path]) -> None:
    async def test() -> None:
        told = Told()
        async with serving(nursery, versions[0], told, max_batch=1, hang_seconds=0.3) as model:
            (pid,) = pids(model)
            os.kill(pid, signal.SIGSTOP)
            results = await asyncio.gather(
                ask(model, 1, seconds=0.2), ask(model, 2), ask(model, 3), return_exceptions=True
            )
            assert isinstance(results[0], Exception) and results[1:] == [2, 3]
            assert told.count("hung") == told.count("lost") == 1
            await until(lambda: model.state.ready, "the new worker")

    asyncio.run(test())


def test_one_that_dies_at_each_start_is_no_fork_bomb(nursery: Nursery, versions: list[Path]) -> None:
    """Nobody is up and nobody comes: requests are refused at once, tries are few, and it heals by itself."""

    async def test() -> None:
        told = Told()
        async with serving(nursery, versions[0], told) as model:
            program = versions[0] / "program.pt2"
            away = program.rename(program.with_suffix(".away"))
            try:
                os.kill(pids(model)[0], signal.SIGKILL)
                await until(lambda: not model.state.ready, "the loss")
                waiting = asyncio.create_task(ask(model, 1))
                await until(lambda: told.count("failed") == 3, "three tries")
                assert told.count("lost") == 1 and "program.pt2" in told.events[-1][1]
                with pytest.raises(WorkerLost):
                    await waiting
                with pytest.raises(WorkerLost) as refused:
                    await ask(model, 2)
                assert refused.value.retry_after >= 0.4, "as long as the next try is away: 0.1, 0.2, 0.4 s, ..."
                assert "program.pt2" in model.state.reason and not model.state.ready
            finally:
                away.rename(program)
            await until(lambda: model.state.ready, "a worker")
            assert await ask(model, 3) == 3.0

    asyncio.run(test())


def test_killed_while_it_starts(nursery: Nursery, versions: list[Path]) -> None:
    async def killer() -> None:
        while True:
            for pid in children(nursery):
                os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.001)

    async def test() -> None:
        task = asyncio.create_task(killer())
        try:
            with pytest.raises(ServingError, match=r"a worker died while it started \(SIGKILL"):
                async with serving(nursery, versions[0], workers=2):
                    pass
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(test())
    assert not children(nursery), "nothing is left, no zombie"


def test_a_killed_zygote_costs_nothing(versions: list[Path]) -> None:
    async def test() -> None:
        nursery = Nursery.open(summing.TABLE)
        try:
            async with serving(nursery, versions[0]) as model:
                assert nursery.pid is not None
                before = nursery.pid
                os.kill(before, signal.SIGKILL)
                assert await ask(model, 4) == 4.0, "workers don't depend on it"
                os.kill(pids(model)[0], signal.SIGKILL)
                await until(lambda: not model.state.ready, "the loss")
                assert await ask(model, 5) == 5.0
                assert nursery.pid != before and model.state.restarts == 1
        finally:
            await nursery.close()
        assert nursery.pid is None

    asyncio.run(test())


def test_out_of_file_descriptors(nursery: Nursery, versions: list[Path]) -> None:
    async def test() -> None:
        told = Told()
        async with serving(nursery, versions[0], told) as model:
            assert await ask(model, 1) == 1.0
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            hoard = []
            resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 50, hard))
            try:
                with pytest.raises(OSError):
                    while True:
                        hoard.append(os.open(os.devnull, os.O_RDONLY))
                assert await ask(model, 2) == 2.0, "what runs needs no new ones"
                os.kill(pids(model)[0], signal.SIGKILL)
                await until(lambda: told.count("failed"), "a try that fails")
                assert "Too many open files" in model.state.reason
            finally:
                for number in hoard:
                    os.close(number)
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            await until(lambda: model.state.ready, "a worker")
            assert await ask(model, 3) == 3.0

    asyncio.run(test())


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_nothing_outlives_a_killed_front(versions: list[Path]) -> None:
    front = subprocess.Popen(
        [sys.executable, str(FIXTURES / "serving_front.py"), str(versions[0]), "2"],
        stdout=subprocess.PIPE,
        env=environment(),
        text=True,
    )
    try:
        assert front.stdout is not None
        up = json.loads(front.stdout.readline())
        numbers = [up["zygote"], *up["workers"]]
        assert len(set(numbers)) == 3 and all(psutil.Process(pid).ppid() == front.pid for pid in numbers)
        os.kill(up["workers"][0], signal.SIGSTOP)  # one that can't even notice
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(up["workers"][1], number)
            os.kill(up["zygote"], number)
        time.sleep(0.05)  # what must not happen has no condition to wait for
        assert all(psutil.pid_exists(pid) for pid in numbers)
    finally:
        front.kill()
        front.wait()
    wait_until(lambda: not any(map(lives, numbers)), "the end of zygote and workers", 10)


def lives(pid: int) -> bool:
    """Collects it, too, where this process adopted it because it forks workers itself."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_zygote_has_one_thread(nursery: Nursery, versions: list[Path]) -> None:
    """More would not survive a fork; and workers with several threads run well after it."""

    async def test() -> None:
        async with serving(nursery, versions[0], threads=2) as model:
            assert await ask(model, 1) == 1.0
            assert nursery.pid is not None
            assert psutil.Process(nursery.pid).num_threads() == 1

    asyncio.run(test())

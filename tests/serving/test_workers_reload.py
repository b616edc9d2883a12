"""A new version takes over without a lost request; one that fails changes nothing; no memory is left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import soak
import summing
from summing import Told, ask, children, pids, sample, serving, until

from serving.errors import Mistake, ServingError
from serving.workers.model import ServedModel
from serving.workers.nursery import Nursery

RELOADS = soak.choose(12, 1000)
MEGABYTE = 1 << 20


async def client(model: ServedModel, number: int, outcomes: Counter[float], going: list[bool]) -> None:
    """Ask without end; each answer must be that of the version that was current when it was asked."""
    while going:
        version = model.bundle.version
        answer = await ask(model, number)
        outcomes[answer / number] += 1
        assert version == model.bundle.version or answer in (number, 2 * number)
        await asyncio.sleep(0.002)


def test_no_request_is_lost_and_memory_is_flat(nursery: Nursery, versions: list[Path]) -> None:
    async def test() -> None:
        outcomes, going, sizes = Counter[float](), [True], []
        async with serving(nursery, versions[0], workers=2) as model:
            clients = [asyncio.create_task(client(model, n, outcomes, going)) for n in range(1, 5)]
            for count in range(RELOADS):
                bundle = await model.reload(versions[(count + 1) % 2])
                assert bundle.version == model.bundle.version
                before = sum(outcomes.values())
                await until(lambda n=before: sum(outcomes.values()) > n, "an answer")
                if count in (RELOADS // 4, RELOADS - 1):
                    gc.collect()
                    sizes.append(size_of_all(nursery))
            going.clear()
            await asyncio.gather(*clients)
            assert outcomes[1.0] and outcomes[2.0] and set(outcomes) == {1.0, 2.0}
            assert model.state.ready and model.state.restarts == 0
            await until(lambda: not model._old, "the old versions' ends")
            assert len(children(nursery)) == 2
        (early_memory, early_files), (late_memory, late_files) = sizes
        memory = f"{early_memory / MEGABYTE:.1f} -> {late_memory / MEGABYTE:.1f} MB"
        print(f"{RELOADS} reloads: {memory}, {early_files} -> {late_files} open files")
        assert late_memory - early_memory < soak.choose(20, 30) * MEGABYTE
        assert abs(late_files - early_files) <= 6, "an old version may still be ending"

    asyncio.run(test())


def size_of_all(nursery: Nursery) -> tuple[int, int]:
    """(resident bytes, open files) of this process and the zygote."""
    processes = [psutil.Process(), psutil.Process(nursery.pid)]
    return sum(p.memory_info().rss for p in processes), sum(p.num_fds() for p in processes)


def test_the_old_version_answers_what_it_has(nursery: Nursery, versions: list[Path]) -> None:
    async def test() -> None:
        async with serving(nursery, versions[0], max_batch=1) as model:
            (pid,) = pids(model)
            os.kill(pid, signal.SIGSTOP)
            held = [asyncio.create_task(ask(model, n)) for n in range(1, 7)]
            await until(lambda: model.state.outstanding == 6, "requests")
            await model.reload(versions[1])
            assert await ask(model, 1) == 2.0, "the new version answers while the old one still holds requests"
            os.kill(pid, signal.SIGCONT)
            assert await asyncio.gather(*held) == [1, 2, 3, 4, 5, 6], "the version that took them answers them"
            await until(lambda: children(nursery) == pids(model), "the end of the old worker")

    asyncio.run(test())


def test_an_old_version_that_does_not_finish_is_ended(nursery: Nursery, versions: list[Path]) -> None:
    async def test() -> None:
        async with serving(nursery, versions[0], drain_seconds=0.2) as model:
            os.kill(pids(model)[0], signal.SIGSTOP)
            held = asyncio.create_task(ask(model, 1))
            await until(lambda: model.state.outstanding == 1, "a request")
            await model.reload(versions[1])
            with pytest.raises(ServingError, match="ended before"):
                await held
            await until(lambda: children(nursery) == pids(model), "the end of the old worker")

    asyncio.run(test())


def test_a_failing_reload_leaves_the_old_version_serving(
    nursery: Nursery, versions: list[Path], tmp_path: Path
) -> None:
    wrong = summing.make(tmp_path / "wrong", 2.0, answers=1.0).path

    async def test() -> None:
        async with serving(nursery, versions[0], workers=2) as model:
            before = pids(model)
            with pytest.raises(ServingError, match="does not answer as it did in training"):
                await model.reload(wrong)
            with pytest.raises(Mistake, match="no such folder"):
                await model.reload(tmp_path / "nothing")
            assert pids(model) == before == children(nursery)
            assert await ask(model, 1) == 1.0 and model.state.ready and model.path == versions[0]

    asyncio.run(test())


def test_a_symlink_that_moves_on(nursery: Nursery, versions: list[Path], tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(versions[0])

    async def test() -> None:
        async with serving(nursery, link) as model:
            link.unlink()
            link.symlink_to(versions[1])
            os.kill(pids(model)[0], signal.SIGKILL)
            await until(lambda: not model.state.ready, "the loss")
            assert await ask(model, 3) == 3.0, "a new worker serves what is served, not what the link shows"
            await model.reload()
            assert await ask(model, 3) == 6.0 and model.path == link

    asyncio.run(test())


def test_files_that_change_under_a_running_version(nursery: Nursery, versions: list[Path], tmp_path: Path) -> None:
    """A worker that is started later must not serve another version than its fellows."""
    place = tmp_path / "bundle"
    shutil.copytree(versions[0], place)

    async def test() -> None:
        told = Told()
        async with serving(nursery, place, told) as model:
            shutil.rmtree(place)
            shutil.copytree(versions[1], place)
            os.kill(pids(model)[0], signal.SIGKILL)
            await until(lambda: told.count("failed"), "a refusal")
            assert "reload it" in model.state.reason
            await model.reload()
            assert await ask(model, 1) == 2.0 and model.state.ready

    asyncio.run(test())


def test_reloads_asked_for_while_one_runs_are_one_more(nursery: Nursery, versions: list[Path]) -> None:
    async def test() -> None:
        told = Told()
        async with serving(nursery, versions[0], told) as model:
            first = asyncio.create_task(model.reload(versions[1]))
            await asyncio.sleep(0)
            others = [asyncio.create_task(model.reload(versions[0])) for _ in range(20)]
            bundles = await asyncio.gather(first, *others)
            assert told.count("up") == 3 and len({bundle.version for bundle in bundles[1:]}) == 1
            assert await ask(model, 1) == 1.0

    asyncio.run(test())


def test_close_while_a_reload_runs(nursery: Nursery, versions: list[Path]) -> None:
    async def test() -> None:
        async with serving(nursery, versions[0]) as model:
            reload = asyncio.create_task(model.reload(versions[1]))
            held = asyncio.create_task(model.predict([sample(1)], time.monotonic() + 60))
            await asyncio.sleep(0)
            await model.close(10.0)
            await asyncio.gather(reload, return_exceptions=True)
            assert len(await held) == 1 and not children(nursery)

    asyncio.run(test())

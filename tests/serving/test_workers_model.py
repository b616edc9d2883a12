"""A model served by processes: right answers, natural batches, bounds, deadlines, and the end."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import summing
import uvloop
from summing import Told, ask, pids, sample, serving, until

from serving.errors import BadInput, Mistake, ServingError
from serving.workers.errors import DeadlineExceeded, Draining, Failed, Overloaded, TooMany
from serving.workers.model import ServedModel
from serving.workers.nursery import INSIDE, Nursery


def later(seconds: float = 60.0) -> float:
    return asyncio.get_running_loop().time() + seconds


async def paused(model: ServedModel) -> int:
    """Stop the only worker, after it took a first request that it can't answer until it goes on; returns its number."""
    (pid,) = pids(model)
    os.kill(pid, signal.SIGSTOP)
    return pid


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_each_request_gets_its_own_answer(nursery: Nursery, versions: list[Path], run: Any) -> None:
    async def test() -> None:
        told = Told()
        async with serving(nursery, versions[0], told, workers=2, max_batch=8, queue=4000) as model:
            assert model.state.ready and model.state.workers_up == 2
            draw = random.Random(0)
            requests = [[draw.sample(range(100), 3) for _ in range(draw.choice((1, 1, 2, 20)))] for _ in range(100)]
            answers = await asyncio.gather(
                *(model.predict([sample(*numbers) for numbers in one], later()) for one in requests)
            )
            for one, rows in zip(requests, answers, strict=True):
                assert [float(row[0][0]) for row in rows] == [sum(numbers) for numbers in one]  # type: ignore[index]
            assert await model.predict([], later()) == []
            assert sum(size for _, size, _ in told.batches) == sum(map(len, requests))
            assert max(size for _, size, _ in told.batches) == 8
            assert model.state.outstanding == model.state.queue_length == 0
        assert told.count("up") == 2 and not told.count("lost")

    run(test())


def test_one_poison_sample_hurts_no_other(nursery: Nursery, versions: list[Path]) -> None:
    async def test() -> None:
        async with serving(nursery, versions[0]) as model:
            pid = await paused(model)
            first = asyncio.create_task(ask(model, 1))
            others = [asyncio.create_task(ask(model, n)) for n in range(5)]
            poisoned = asyncio.create_task(model.predict([sample(4), sample(1000), sample(5)], later()))
            await asyncio.sleep(0)
            os.kill(pid, signal.SIGCONT)
            assert await first == 1.0 and await asyncio.gather(*others) == [0, 1, 2, 3, 4]
            good, bad, also_good = await poisoned
            assert isinstance(good, tuple) and good[0][0] == 4.0
            assert isinstance(also_good, tuple) and also_good[0][0] == 5.0
            assert isinstance(bad, Failed) and "index" not in str(bad), "details are for the log"
            assert pids(model) == [pid]

    asyncio.run(test())


def test_a_free_worker_takes_what_is_there(nursery: Nursery, versions: list[Path]) -> None:
    async def test() -> None:
        told = Told()
        async with serving(nursery, versions[0], told, max_batch=16) as model:
            assert await ask(model, 3) == 3.0
            pid = await paused(model)
            tasks = [asyncio.create_task(ask(model, n)) for n in range(40)]
            await until(lambda: model.state.queue_length == 40 - 2 * 16, "two full batches with the worker, no more")
            os.kill(pid, signal.SIGCONT)
            assert await asyncio.gather(*tasks) == list(range(40))
            assert [size for _, size, _ in told.batches] == [1, 16, 16, 8]
            assert all(wait > 0 for wait in told.batches[-1][2])

    asyncio.run(test())


def test_max_wait_gathers_a_fuller_batch(nursery: Nursery, versions: list[Path]) -> None:
    async def test() -> None:
        told = Told()
        async with serving(nursery, versions[0], told, max_batch=4, max_wait=30.0) as model:
            tasks = []
            for n in range(4):
                tasks.append(asyncio.create_task(ask(model, n)))
                await asyncio.sleep(0.01)
            assert await asyncio.gather(*tasks) == [0, 1, 2, 3]
            assert [size for _, size, _ in told.batches] == [4]
        async with serving(nursery, versions[0], told, max_batch=4, max_wait=0.05) as model:
            begun = later(0.0)
            assert await ask(model, 9) == 9.0
            assert later(0.0) - begun >= 0.045 and told.batches[-1][1] == 1

    asyncio.run(test())


def test_the_queue_is_bounded(nursery: Nursery, versions: list[Path]) -> None:
    async def test() -> None:
        async with serving(nursery, versions[0], max_batch=2, queue=6) as model:
            assert await ask(model, 1) == 1.0
            pid = await paused(model)
            tasks = [asyncio.create_task(ask(model, n)) for n in range(4)]
            await until(lambda: model.state.outstanding == 4 and not model.state.queue_length, "two batches held")
            tasks += [asyncio.create_task(ask(model, n)) for n in range(4, 10)]
            await until(lambda: model.state.queue_length == 6, "a full queue")
            with pytest.raises(Overloaded) as full:
                await ask(model, 10)
            assert 0 < full.value.retry_after < 60
            with pytest.raises(TooMany, match="at most 6"):
                await model.predict([sample(1)] * 7, later())
            os.kill(pid, signal.SIGCONT)
            assert await asyncio.gather(*tasks) == list(range(10))
            assert await ask(model, 11) == 11.0

    asyncio.run(test())


def test_deadlines_are_kept_and_the_late_are_not_run(nursery: Nursery, versions: list[Path]) -> None:
    async def test() -> None:
        told = Told()
        async with serving(nursery, versions[0], told, max_batch=1) as model:
            with pytest.raises(DeadlineExceeded):
                await ask(model, 1, seconds=0.0)
            pid = await paused(model)
            begun = later(0.0)
            held = [asyncio.create_task(ask(model, n, seconds=0.2)) for n in range(5)]
            patient = asyncio.create_task(ask(model, 7))
            results = await asyncio.gather(*held, return_exceptions=True)
            assert all(isinstance(result, DeadlineExceeded) for result in results)
            assert 0.19 <= later(0.0) - begun < 30
            os.kill(pid, signal.SIGCONT)
            assert await patient == 7.0
            assert len(told.batches) == 3, "the two that the worker held, and the patient one"
            assert model.state.outstanding == model.state.queue_length == 0


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_deadlines_shorter_than_the_loops_clock_can_tell(nursery: Nursery, versions: list[Path], run: Any) -> None:
    """Due at once, by either loop: refused or answered, each with its own number, and nothing is left waiting."""

    async def test() -> None:
        draw = random.Random(0)
        async with serving(nursery, versions[0], max_batch=4) as model:
            for _ in range(50):
                asked = [ask(model, number, seconds=draw.random() * draw.choice((2e-5, 2e-3))) for number in range(20)]
                results = await asyncio.gather(*asked, return_exceptions=True)
                for number, result in enumerate(results):
                    assert isinstance(result, DeadlineExceeded) or result == number
            assert model.state.outstanding == 0 and await ask(model, 7) == 7.0

    run(test())

    asyncio.run(test())


def test_who_has_gone_is_not_run(nursery: Nursery, versions: list[Path]) -> None:
    async def test() -> None:
        told = Told()
        async with serving(nursery, versions[0], told, max_batch=2) as model:
            pid = await paused(model)
            held = [asyncio.create_task(ask(model, n)) for n in range(4)]
            await until(
                lambda: model.state.outstanding == 4 and not model.state.queue_length, "batches with the worker"
            )
            gone = [asyncio.create_task(ask(model, n)) for n in range(4, 10)]
            here = asyncio.create_task(ask(model, 10))
            await until(lambda: model.state.queue_length == 7, "a queue")
            for task in gone:
                task.cancel()
            await asyncio.gather(*gone, return_exceptions=True)
            assert model.state.queue_length == 1
            os.kill(pid, signal.SIGCONT)
            assert await here == 10.0 and await asyncio.gather(*held) == [0, 1, 2, 3]
            assert sum(size for _, size, _ in told.batches) == 5

    asyncio.run(test())


def test_close_answers_what_is_there_and_takes_nothing_more(nursery: Nursery, versions: list[Path]) -> None:
    async def test() -> None:
        async with serving(nursery, versions[0], max_batch=2) as model:
            pid = await paused(model)
            held = [asyncio.create_task(ask(model, n)) for n in range(9)]
            await until(lambda: model.state.outstanding == 9, "requests")
            closing = asyncio.create_task(model.close(60.0))
            await until(lambda: not model.state.ready, "the state")
            with pytest.raises(Draining):
                await ask(model, 1)
            os.kill(pid, signal.SIGCONT)
            assert await asyncio.gather(*held) == list(range(9))
            await closing
            assert not pids(model)
            with pytest.raises(ServingError, match="about to end"):
                await model.reload()

    asyncio.run(test())


def test_a_bundle_that_answers_otherwise_is_refused_with_the_numbers(nursery: Nursery, tmp_path: Path) -> None:
    path = summing.make(tmp_path / "wrong", 1.0, answers=1.5).path

    async def test() -> None:
        with pytest.raises(ServingError, match=r"does not answer as it did.*8 golden requests is 0\.333"):
            async with serving(nursery, path, workers=2):
                pass

    asyncio.run(test())


def test_a_changed_byte_is_refused(nursery: Nursery, versions: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "changed"
    shutil.copytree(versions[0], path)
    program = bytearray((path / "program.pt2").read_bytes())
    program[len(program) // 2] ^= 1
    (path / "program.pt2").write_bytes(program)

    async def test() -> None:
        with pytest.raises(Mistake, match=r"program\.pt2 is not the file that was exported"):
            async with serving(nursery, path):
                pass
        with pytest.raises(Mistake, match="there is no such folder"):
            async with serving(nursery, tmp_path / "nothing"):
                pass

    asyncio.run(test())


def test_a_sample_that_can_not_be_prepared_is_told_as_such(nursery: Nursery, tmp_path: Path) -> None:
    path = pictures(tmp_path / "pictures")

    async def test() -> None:
        from serving import inputs
        from serving.bundle import Bundle

        bundle = Bundle.read(path)
        parse = inputs.load(bundle.preprocessing, bundle.signature)
        async with serving(nursery, path) as model:
            grey = parse.parse([[9, 9], [9, 9]], "instances[0]")
            torn = parse.parse_bytes(b"\x89PNG no picture", "body")
            bomb = parse.parse_bytes(png_header(60_000, 60_000), "body")
            good, bad, too_large = await model.predict([grey, torn, bomb], later())
            assert isinstance(good, tuple) and good[0][0] == 9.0
            assert isinstance(bad, BadInput) and bad.field == "body" and bad.is_undecodable
            assert isinstance(too_large, BadInput)

    asyncio.run(test())


def pictures(folder: Path) -> Path:
    """A bundle that takes pictures and gives their mean."""
    import torch

    from serving.bundle import finish

    class Mean(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float().flatten(1).mean(1, keepdim=True)

    folder.mkdir()
    example = (torch.ones(2, 1, 2, 2, dtype=torch.uint8),)
    program = torch.export.export(Mean(), example, dynamic_shapes=({0: torch.export.Dim("batch")},))
    program._example_inputs = None  # they would be pickled
    torch.export.save(program, folder / "program.pt2")
    golden = {"request": [[1, 1], [1, 1]], "outputs": {"mean": [1.0]}}
    (folder / "golden.jsonl").write_text(json.dumps(golden) + "\n")
    preprocessing = {"kind": "picture", "channels": 1, "height": 2, "width": 2, "resize": "crop"}
    common = {"unit": "", "description": ""}
    content = {
        "name": "summing",
        "task": "test",
        "program": {"runtime": "pt2", "file": "program.pt2", "dtype": "float32", "max_batch": 4},
        "preprocessing": preprocessing,
        "signature": {
            "inputs": [{"name": "x", "dtype": "uint8", "shape": [-1, 1, 2, 2], **common}],
            "outputs": [{"name": "mean", "dtype": "float32", "shape": [-1, 1], **common}],
            "labels": None,
        },
        "postprocessing": {"kind": "tensor"},
        "golden": {"file": "golden.jsonl", "count": 1, "tolerance": 1e-4},
        "metrics": {},
        "run": {},
        "warmup_batches": [1],
    }
    return finish(folder, content).path


def png_header(width: int, height: int) -> bytes:
    """The beginning of a picture of that size."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_no_server_starts_within_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INSIDE, "1")
    with pytest.raises(ServingError, match="starts a server"):
        Nursery.open(1)

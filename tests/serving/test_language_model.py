"""A language model in this process: the queue's bound, deadlines, reloads, a silent engine, the end."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import language_bundles
import pytest

from serving.errors import Mistake, ServingError
from serving.language.messages import Ask
from serving.language.model import LanguageModel, start
from serving.language.observer import Silent
from serving.language.routes import Asked, Reply, answer
from serving.language.sampling import Sampling
from serving.language.settings import LanguageSettings
from serving.workers.errors import Draining, Overloaded, WorkerLost

SETTINGS = LanguageSettings(threads=1, max_rows=2, queue=2, kv_tokens=2_000, hang_seconds=60)
LONG = Ask(0, "abc", None, None, Sampling(max_tokens=450, ignore_eos=True, temperature=0))


class Events(Silent):
    """What was told of the engines."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def worker(self, model: str, event: str, detail: str) -> None:
        self.found.append(event)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two versions of a bundle."""
    folder = tmp_path_factory.mktemp("model")
    return tuple(language_bundles.write(folder / f"v{seed}", seed=seed).path for seed in (0, 1))  # type: ignore


async def _until(look: Callable[[], bool], seconds: float = 240) -> None:
    async with asyncio.timeout(seconds):
        while not look():
            await asyncio.sleep(0.02)


async def _reply(model: LanguageModel, body: dict[str, Any], seconds: float = math.inf) -> Reply:
    asked = Asked("/v1/completions", json.dumps({"model": "tiny", **body}).encode(), seconds)
    return await answer(asked, {"tiny": model})


def _with(path: Path, work: Callable[[LanguageModel, Events], Awaitable[None]], **changes: Any) -> None:
    async def run() -> None:
        events = Events()
        model = await start("tiny", path, replace(SETTINGS, **changes), events)
        try:
            await work(model, events)
        finally:
            await model.close(0)
        assert model.engine.outstanding == 0 and not model.state.ready

    asyncio.run(asyncio.wait_for(run(), 280))


def test_the_queue_has_a_bound_and_places_are_freed(folders: tuple[Path, Path]) -> None:
    async def work(model: LanguageModel, events: Events) -> None:
        loop = asyncio.get_running_loop()
        held = [model.ask(LONG, loop.time() + 200) for _ in range(4)]
        with pytest.raises(Overloaded) as caught:
            model.ask(LONG, loop.time() + 200)
        assert 1 <= caught.value.retry_after <= 60
        reply = await _reply(model, {"prompt": "abc"})
        assert reply.status == 503 and int(reply.headers["retry-after"]) >= 1
        for one in held:
            await one.begun()
        await _until(lambda: model.engine.running == 2 and model.state.queue_length == 2)
        for one in held[1:]:
            one.close()
        # A stream that nobody reads to its end frees its place, too.
        streamed = await _reply(model, {"prompt": "abc", "max_tokens": 400, "ignore_eos": True, "stream": True})
        assert streamed.status == 200 and not isinstance(streamed.body, bytes)
        await anext(streamed.body)
        await streamed.body.aclose()  # type: ignore[attr-defined]
        # And so does an answer whose request is cancelled.
        task = asyncio.create_task(_reply(model, {"prompt": "abc", "max_tokens": 400, "ignore_eos": True}))
        await _until(lambda: model.engine.outstanding == 2)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert model.engine.outstanding == 1
        held[0].close()
        short = await _reply(model, {"prompt": "abc", "max_tokens": 2, "ignore_eos": True})
        assert short.status == 200
        assert model.engine.running <= 1 and model.engine.waiting == 0
        late = await _reply(model, {"prompt": "abc", "max_tokens": 450, "ignore_eos": True}, seconds=0.04)
        assert late.status == 504

    _with(folders[0], work)


def test_a_reload_loses_no_request_and_a_bad_one_changes_nothing(folders: tuple[Path, Path], tmp_path: Path) -> None:
    async def work(model: LanguageModel, events: Events) -> None:
        loop = asyncio.get_running_loop()
        old = model.bundle.version
        held = model.ask(LONG, loop.time() + 250)
        await held.begun()
        damaged = language_bundles.write(tmp_path / "damaged", seed=1).path
        with (damaged / "model" / "model.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))
        with pytest.raises(Mistake, match=r"model\.safetensors is not the file that was exported"):
            await model.reload(damaged)
        assert model.bundle.version == old and model.state.ready
        await model.reload(folders[1])
        assert model.bundle.version != old
        reply = await _reply(model, {"prompt": "abc", "max_tokens": 2})
        assert (reply.status, reply.version) == (200, model.bundle.version)
        tokens = 0
        async for part in held.parts():
            tokens += part.tokens
        assert tokens == 450 and held.version == old

    _with(folders[0], work)


def test_golden_prompts_that_are_answered_otherwise_keep_it_from_starting(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    from serving.bundle import MANIFEST, finish

    bundle = language_bundles.write(tmp_path / "other", seed=2)
    golden = (folders[0] / "golden.jsonl").read_bytes()
    (bundle.path / "golden.jsonl").write_bytes(golden)
    (bundle.path / MANIFEST).unlink()
    finish(bundle.path, language_bundles.content("other", [], 3))
    with pytest.raises(ServingError, match="golden prompt"):
        asyncio.run(asyncio.wait_for(start("other", bundle.path, SETTINGS, Events()), 250))


def test_a_silent_engine_is_replaced_and_a_drain_takes_no_more(folders: tuple[Path, Path]) -> None:
    async def work(model: LanguageModel, events: Events) -> None:
        loop = asyncio.get_running_loop()
        held = model.ask(LONG, loop.time() + 200)
        await held.begun()
        pid = model.engine.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(WorkerLost):
            async for _ in held.parts():
                pass
        assert not model.state.ready and "not up" in model.state.reason
        await _until(lambda: model.state.ready)
        assert events.found == ["up", "hung", "lost", "up"] and model.state.restarts == 1
        held = model.ask(Ask(0, "abc", None, None, Sampling(max_tokens=100, ignore_eos=True)), loop.time() + 200)
        closing = asyncio.create_task(model.close(60))
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            model.ask(LONG, loop.time() + 200)
        assert model.state.reason == "tiny: draining"
        await held.begun()
        assert sum([part.tokens async for part in held.parts()]) == 100
        await closing

    _with(folders[0], work, hang_seconds=8)

"""A language model that is served under one name, over crashes and reloads of its engine."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from serving.bundle import Bundle
from serving.errors import Mistake, ServingError
from serving.language.engine import Answer, Engine
from serving.language.messages import Ask
from serving.language.observer import LanguageObserver
from serving.language.settings import LanguageSettings
from serving.workers.errors import Draining, Overloaded, WorkerLost

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 30.0
"""Seconds before a lost engine is started again; doubled each time that it does not come up."""
LOOK_EVERY = 1.0


@dataclass(frozen=True)
class LanguageState:
    """For readiness and metrics."""

    ready: bool
    reason: str
    workers_up: int
    workers_wanted: int
    queue_length: int
    restarts: int
    outstanding: int


class LanguageModel:
    """One name. Its engine is another one after a crash or a reload."""

    def __init__(self, name: str, path: Path, settings: LanguageSettings, observer: LanguageObserver) -> None:
        self.name, self.path, self.settings, self.observer = name, path, settings, observer
        self._engine = Engine(name, Bundle.read(path), settings)
        self._is_closing = False
        self._restarts = 0
        self._reloading = asyncio.Lock()
        self._keeper: asyncio.Task[None] | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        self._seconds = 2.0
        """What an answer takes, about."""

    @property
    def bundle(self) -> Bundle:
        """The one that answers now."""
        return self._engine.bundle

    @property
    def engine(self) -> Engine:
        """The process that answers now."""
        return self._engine

    def names(self) -> list[str]:
        """What a request may call it: the model itself, and it with each adapter."""
        return [self.name, *(f"{self.name}:{adapter}" for adapter in self.bundle.adapters)]

    @property
    def state(self) -> LanguageState:
        """Ready while its engine is up."""
        engine = self._engine
        up = engine.ready is not None and not engine.lost.is_set()
        reason = "" if up else f"{self.name}: its engine is not up"
        if self._is_closing:
            reason = f"{self.name}: draining"
        return LanguageState(
            ready=up and not self._is_closing,
            reason=reason,
            workers_up=int(up),
            workers_wanted=1,
            queue_length=engine.waiting,
            restarts=self._restarts,
            outstanding=engine.outstanding,
        )

    async def open(self) -> None:
        """Start the engine. Raises ServingError."""
        await self._engine.start()
        self.observer.worker(self.name, "up", f"version {self.bundle.version}")
        self._keeper = asyncio.create_task(self._keep(), name=f"keeper of {self.name}")

    def ask(self, ask: Ask, deadline: float) -> Answer:
        """Hand a request over. Close the answer in any case.

        Raises Overloaded, WorkerLost, Draining.
        """
        if self._is_closing:
            raise Draining("the server is about to end", 1.0)
        engine = self._engine
        bound = self.settings.max_rows + self.settings.queue
        if engine.outstanding >= bound:
            after = self._seconds * max(1, self.settings.queue) / self.settings.max_rows
            raise Overloaded(f"{self.name}: {bound} requests are waiting already", min(max(after, 1.0), 60.0))
        if engine.ready is None:
            raise WorkerLost(f"{self.name}: its engine is not up yet; try again", FIRST_PAUSE)
        return engine.ask(ask, deadline)

    def answered(self, seconds: float) -> None:
        """What an answer took, for the advice to come back later."""
        self._seconds += 0.1 * (seconds - self._seconds)

    async def reload(self, path: Path | None = None) -> Bundle:
        """Switch to what is in the folder now, once it has proved itself; the old engine answers what it holds.

        Raises ServingError, and the old one goes on.
        """
        async with self._reloading:
            place = path or self.path
            engine = Engine(self.name, Bundle.read(place), self.settings)
            await engine.start()
            old, self._engine, self.path = self._engine, engine, place
            self.observer.worker(self.name, "up", f"version {engine.bundle.version}")
            task = asyncio.create_task(_leave(old, self.settings.drain_seconds))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)
            return engine.bundle

    async def close(self, drain: float) -> None:
        """Take no more requests, answer those that are there for up to `drain` seconds, end."""
        self._is_closing = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        await asyncio.gather(_leave(self._engine, drain), *self._leaving)

    async def _keep(self) -> None:
        """Start an engine anew when it is gone."""
        pause = FIRST_PAUSE
        while True:
            engine = self._engine
            try:
                async with asyncio.timeout(LOOK_EVERY):
                    await engine.lost.wait()
            except TimeoutError:
                pause = FIRST_PAUSE
                if engine.is_hung(asyncio.get_running_loop().time()):
                    self.observer.worker(self.name, "hung", f"silent for {self.settings.hang_seconds:g} s")
                    await engine.kill()
                continue
            if engine is not self._engine:  # replaced by a reload
                continue
            self.observer.worker(self.name, "lost", f"process {engine.pid}")
            await engine.kill()
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            await self._restart(engine)

    async def _restart(self, lost: Engine) -> None:
        async with self._reloading:
            if self._engine is not lost:
                return
            try:
                # The version that was served, wherever `path` points by now: another one comes by a reload.
                engine = Engine(self.name, Bundle.read(lost.bundle.path), self.settings)
                if engine.bundle.version != lost.bundle.version:
                    raise Mistake(f"{lost.bundle.path}: was replaced; reload it")
                await engine.start()
            except ServingError as error:
                self.observer.worker(self.name, "failed", str(error))
                return
            self._restarts += 1
            self._engine = engine
            self.observer.worker(self.name, "up", f"version {engine.bundle.version}")


async def _leave(engine: Engine, seconds: float) -> None:
    await engine.drain(seconds)
    await engine.stop()


async def start(name: str, path: Path, settings: LanguageSettings, observer: LanguageObserver) -> LanguageModel:
    """Serve the bundle in `path` under `name`. Raises ServingError with the reason why it can't be."""
    model = LanguageModel(name, path, settings, observer)
    await model.open()
    return model

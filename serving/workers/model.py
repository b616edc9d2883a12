"""A model under one name, whatever version of it is served."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from serving.bundle import Bundle
from serving.errors import ServingError
from serving.workers.nursery import Nursery
from serving.workers.observer import Observer
from serving.workers.settings import Settings
from serving.workers.version import Version

if TYPE_CHECKING:
    from serving.inputs import Arrays, Encoded
    from serving.workers.messages import Item


@dataclass(frozen=True)
class ModelState:
    """How a model does."""

    ready: bool
    reason: str
    """Why it is not ready; empty where it is."""
    workers_up: int
    workers_wanted: int
    queue_length: int
    """Samples that wait for a worker."""
    outstanding: int
    """Requests without an answer."""
    restarts: int
    """Workers that were replaced because they ended."""


class ServedModel:
    """Predicts with the current version; `reload` replaces it without losing a request."""

    def __init__(
        self, name: str, path: Path, settings: Settings, observer: Observer, nursery: Nursery, first: Version
    ) -> None:
        """Use `start`."""
        self.name, self.path = name, path
        """`path` may be a symlink that comes to point elsewhere."""
        self._settings, self._observer, self._nursery = settings, observer, nursery
        self.current = first
        self._restarts = 0
        self._old: set[asyncio.Task[None]] = set()
        self._reloads: dict[Path | None, asyncio.Task[Bundle]] = {}
        """Those that have not begun."""
        self._one_at_a_time = asyncio.Lock()
        self._closing = False

    @property
    def bundle(self) -> Bundle:
        """Of the current version."""
        return self.current.bundle

    @property
    def state(self) -> ModelState:
        crew = self.current.crew
        up, wanted = len(crew.up), self._settings.workers
        reason = ""
        if self._closing:
            reason = "the server is about to end"
        elif up < wanted:
            reason = f"{self.name}: {wanted - up} of {wanted} workers restarting" + (
                f": {crew.reason}" if crew.reason else ""
            )
        return ModelState(
            ready=not reason,
            reason=reason,
            workers_up=up,
            workers_wanted=wanted,
            queue_length=self.current.queue.length,
            outstanding=self.current.outstanding,
            restarts=self._restarts + crew.restarts,
        )

    async def predict(self, samples: Sequence[Encoded | Arrays], deadline: float) -> list[Item]:
        """One result for each sample: a row (arrays without a batch dimension), BadInput, or Failed.

        The request is in the queue of the current version when this first waits. Cancelled, it is not run.

        Args:
            samples: as the input of the current bundle parses them.
            deadline: on the loop's clock, seconds.

        Raises:
            Overloaded, TooMany, DeadlineExceeded, WorkerLost, Draining: there is no answer; see `errors`.
        """
        return await self.current.predict(samples, deadline)

    async def reload(self, path: Path | None = None) -> Bundle:
        """Serve what is at `path` (by default where the model came from) once its workers are up.

        Those who ask while a reload runs wait for one more, together.

        Raises:
            ServingError: nothing has changed, and why.
        """
        task = self._reloads.get(path)
        if task is None:
            task = self._reloads[path] = asyncio.create_task(self._reload(path))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(task)

    async def close(self, drain: float) -> None:
        """Take nothing more; wait `drain` seconds for what is there; end all workers."""
        self._closing = True
        async with self._one_at_a_time:
            await self.current.drain(drain)
        await asyncio.gather(*self._old)

    async def _reload(self, path: Path | None) -> Bundle:
        async with self._one_at_a_time:
            self._reloads.pop(path)
            if self._closing:
                raise ServingError(f"{self.name}: the server is about to end")
            target = path or self.path
            new = await _up(self.name, target, self._settings, self._observer, self._nursery)
            old, self.current, self.path = self.current, new, target
            self._restarts += old.crew.restarts
            task = asyncio.create_task(old.drain(self._settings.drain_seconds))
            self._old.add(task)
            task.add_done_callback(self._old.discard)
            return new.bundle


async def start(name: str, path: Path, settings: Settings, observer: Observer, nursery: Nursery) -> ServedModel:
    """Bring a bundle up: hashes compared, golden requests answered as in training, warm.

    Raises:
        Mistake, ServingError: why it can't be served; nothing is left behind.
    """
    first = await _up(name, path, settings, observer, nursery)
    return ServedModel(name, path, settings, observer, nursery, first)


async def _up(name: str, path: Path, settings: Settings, observer: Observer, nursery: Nursery) -> Version:
    bundle = await asyncio.to_thread(Bundle.read, path)
    version = Version(name, bundle, settings, nursery, observer)
    await version.start()
    return version

"""One version of a model: its queue, its workers, and who of them takes what when."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from serving.bundle import Bundle
from serving.workers.crew import Crew, largest_batch
from serving.workers.errors import DeadlineExceeded, Draining, Overloaded, TooMany, WorkerLost
from serving.workers.nursery import Nursery
from serving.workers.observer import Observer
from serving.workers.queue import Queue, Request, Taken
from serving.workers.settings import Settings
from serving.workers.worker import Worker

if TYPE_CHECKING:
    from serving.inputs import Arrays, Encoded
    from serving.workers.messages import Item

IN_FLIGHT = 2
"""Batches that a worker holds at most: one that it runs, and the next, so that it need not wait for it."""
SMOOTHING = 0.1
"""Weight of the newest batch in the mean time of a sample."""


class Version:
    """Answers requests with one bundle until it is drained."""

    def __init__(self, name: str, bundle: Bundle, settings: Settings, nursery: Nursery, observer: Observer) -> None:
        self.name, self.bundle = name, bundle
        self._settings, self._observer = settings, observer
        self._largest = largest_batch(bundle, settings)
        self._loop = asyncio.get_running_loop()
        self.queue = Queue(settings.queue, settings.queue_bytes)
        self.crew = Crew(name, bundle, settings, nursery, observer, self._on_answer, self._on_loss, self._on_change)
        self._outstanding: dict[Request, None] = {}
        self._is_closed = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_scheduled = False
        self._sweeper: asyncio.Handle | None = None
        self._sweep_at = 0.0
        """When the sweeper runs; uvloop's handle of something that is due at once doesn't tell."""
        self._gatherer: asyncio.TimerHandle | None = None
        self._sample_seconds = 0.0

    @property
    def outstanding(self) -> int:
        """Requests without an answer."""
        return len(self._outstanding)

    async def start(self) -> None:
        """Bring the workers up. Raises ServingError, with nothing left behind."""
        await self.crew.start()

    async def predict(self, samples: Sequence[Encoded | Arrays], deadline: float) -> list[Item]:
        """See `ServedModel.predict`."""
        if self._is_closed:
            raise Draining("the server is about to end", 1.0)
        if not samples:
            return []
        if len(samples) > self.queue.most:
            raise TooMany(self.queue.most)
        now = time.monotonic()
        if deadline <= now:
            raise DeadlineExceeded("the deadline had passed when the request was read")
        if self.crew.is_broken:
            raise WorkerLost("no worker could be started", max(1.0, self.crew.wait))
        request = Request(samples, now, deadline, self._loop.create_future())
        if not self.queue.fits(request):
            raise Overloaded("too many requests wait already", self._retry_after())
        self.queue.put(request)
        self._outstanding[request] = None
        self._idle.clear()
        self._wake()
        self._look_again(deadline)
        try:
            return await request.answer
        finally:
            self._forget(request)

    async def drain(self, seconds: float) -> None:
        """Take nothing more, answer what is there, end the workers. What takes longer is given up."""
        self._is_closed = True
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            for request in list(self._outstanding):
                request.fail(WorkerLost("the server ended before the request was answered", 1.0))
            self.crew.strike_all()
        finally:
            for timer in (self._sweeper, self._gatherer):
                if timer is not None:
                    timer.cancel()
            await self.crew.end()

    # -- who takes what -------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        """Look at the queue once all that has arrived in this turn of the loop is in it."""
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._is_scheduled = False
        while self.queue.length:
            worker, share = self._chosen()
            if worker is None or self._gathers():
                return
            taken = self.queue.take(share, self._settings.batch_bytes)
            if taken is None:
                return
            worker.send(taken)
            self._look_again(self._patience(worker))

    def _chosen(self) -> tuple[Worker | None, int]:
        """Who takes the next batch, and how many samples at most."""
        up = self.crew.up
        if idle := [worker for worker in up if not worker.held]:
            return idle[0], min(self._largest, -(-self.queue.length // len(idle)))
        for worker in up:
            # As much as it runs now is enough to keep it busy for as long; less may still grow while it is.
            if len(worker.held) < IN_FLIGHT and self.queue.length >= min(len(worker.held[0].samples), self._largest):
                return worker, self._largest
        return None, 0

    def _gathers(self) -> bool:
        """Whether to wait for a fuller batch."""
        if not self._settings.max_wait or self.queue.length >= self._largest:
            return False
        oldest = self.queue.oldest()
        until = (oldest if oldest is not None else 0.0) + self._settings.max_wait
        if time.monotonic() >= until:
            return False
        if self._gatherer is None:
            self._gatherer = self._loop.call_at(until, self._gathered)
        return True

    def _gathered(self) -> None:
        self._gatherer = None
        self._dispatch()

    # -- what comes back ------------------------------------------------------------------------------------------

    def _on_answer(self, worker: Worker, taken: Taken, results: list[Item], seconds: float) -> None:
        self._dispatch()  # first of all: the worker must not wait until the clients have their answers
        taken.settle(results)
        size = len(results)
        each = seconds / size
        self._sample_seconds += (each - self._sample_seconds) * (SMOOTHING if self._sample_seconds else 1.0)
        waits = [max(0.0, taken.began - request.arrived) for request, _, _ in taken.origins]
        self._observer.batch(self.name, self.bundle.version, size, waits, seconds)

    def _on_loss(self, worker: Worker) -> None:
        """What it ran is lost; what it had not begun goes to another."""
        if not worker.held:
            return
        first, *rest = worker.held
        worker.held.clear()
        first.fail(WorkerLost("the process that held the request ended; nothing is known of its answer", 1.0))
        for request, _, _ in first.origins:
            self._forget(request)
        for taken in rest:
            self.queue.put_back(taken)
        self._wake()

    def _on_change(self) -> None:
        if self.crew.is_broken:
            for request in list(self._outstanding):
                request.fail(WorkerLost("no worker could be started", max(1.0, self.crew.wait)))
                self._forget(request)
        self._wake()

    def _forget(self, request: Request) -> None:
        if self._outstanding.pop(request, self) is None:
            self.queue.give_up(request)
            if not self._outstanding:
                self._idle.set()

    # -- what takes too long --------------------------------------------------------------------------------------

    def _patience(self, worker: Worker) -> float:
        """When a worker must have answered the batch that it runs."""
        first = worker.held[0]
        return max(first.deadline, first.began) + self._settings.hang_seconds

    def _look_again(self, at: float) -> None:
        if self._sweeper is None or at < self._sweep_at:
            if self._sweeper is not None:
                self._sweeper.cancel()
            self._sweep_at = at
            self._sweeper = self._loop.call_at(at, self._sweep)

    def _sweep(self) -> None:
        """Tell those whose time is up, end workers that hang."""
        self._sweeper = None
        now = time.monotonic() + 0.001  # the loop's clock has whole milliseconds
        for request in [request for request in self._outstanding if request.deadline <= now]:
            request.fail(DeadlineExceeded("the deadline has passed"))
            self._forget(request)
        for worker in self.crew.up:
            if worker.held and self._patience(worker) <= now:
                worker.is_up = False
                self._observer.worker(self.name, "hung", f"process {worker.pid}: no answer to a batch; killed")
                worker.strike()
        upcoming = [request.deadline for request in self._outstanding]
        upcoming += [self._patience(worker) for worker in self.crew.up if worker.held]
        if upcoming:
            self._look_again(min(upcoming))

    def _retry_after(self) -> float:
        """Seconds until the queue will be worked off, at the pace of late; 1 where nothing is known yet."""
        if not self._sample_seconds:
            return 1.0
        return self.queue.length * self._sample_seconds / max(1, len(self.crew.up))

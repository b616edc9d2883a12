"""One worker process, seen from the front."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from serving.workers.link import Link
from serving.workers.messages import (
    Answer,
    Batch,
    End,
    Hello,
    Load,
    Message,
    Ready,
    Refused,
    Verified,
    encode,
    pack,
    unpack,
)
from serving.workers.nursery import Nursery
from serving.workers.queue import Taken

if TYPE_CHECKING:
    from serving.workers.messages import Item

END_SECONDS = 5.0
"""How long a worker that was told to end may take."""
REAP_SECONDS = 0.005


class StartFailed(Exception):
    """A worker did not come up; the text says why."""

    def __init__(self, reason: str, is_mistake: bool = False) -> None:
        super().__init__(reason)
        self.is_mistake = is_mistake
        """It is the bundle that is wrong: it would fail each time."""


class Unborn(StartFailed):
    """There was nobody to fork it."""


class Worker:
    """A process that answers batches in the order in which they are sent."""

    def __init__(self, answered: Callable[[Worker, Taken, list[Item], float], None], lost: Callable[[Worker], None]):
        self._answered, self._lost = answered, lost
        self.pid: int | None = None
        self.is_up = False
        self.held: deque[Taken] = deque()
        """Batches without an answer; the worker is at the first."""
        self.died_early = False
        """It ended before it was ready, without a word."""
        self.exit = ""
        """How the process ended, once it has."""
        self._link: Link | None = None
        self._verified: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._met, self._gone = asyncio.Event(), asyncio.Event()
        for future in (self._verified, self._ready):
            future.add_done_callback(_look_at)

    async def start(self, nursery: Nursery, modules: list[str], load: Load) -> None:
        """Have it forked and given its work; `verified` and `ready` tell the rest.

        Raises:
            Unborn: the zygote ended before it could fork; the next one will.
            StartFailed: it can't be forked.
        """
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            with theirs:
                try:
                    ours.setblocking(False)
                    nursery.fork(theirs, modules)
                    self._link = await Link.over(ours, self._hear, self._end_of_link)
                except BaseException:
                    ours.close()
                    raise
        except OSError as error:
            raise StartFailed(f"can't start a worker: {error.strerror or error}") from error
        self._link.send(encode(load))
        await self._met.wait()
        if self.pid is None:
            await self.ready()  # raises

    async def verified(self) -> None:
        """Once it has compared the bundle's hashes. Raises StartFailed."""
        await asyncio.shield(self._verified)

    async def ready(self) -> Ready:
        """Once it can take batches. Raises StartFailed."""
        return await asyncio.shield(self._ready)

    def send(self, taken: Taken) -> None:
        """Give it a batch."""
        assert self._link is not None
        parts, buffers, size = pack(taken.samples)
        if not self.held:
            taken.began = time.monotonic()
        self.held.append(taken)
        self._link.send(encode(Batch(parts), buffers, size))

    async def end(self) -> None:
        """Tell it to end after what it holds; kill it where it does not. Returns when the process is gone."""
        self.is_up = False
        if self._link is not None and not self._gone.is_set():
            self._link.send(encode(End()))
            await _within(END_SECONDS, self._gone)
        await self.kill()

    async def kill(self) -> None:
        """End the process now. Returns when it is gone."""
        if self._link is not None:
            await _within(END_SECONDS, self._met)  # before its hello nobody knows its number
            self.strike()
            self._link.close()
            await self._gone.wait()
        await self._reap()

    async def gone(self) -> None:
        """When the process has ended, `exit` says how."""
        await self._gone.wait()
        await self.kill()

    def strike(self) -> None:
        """SIGKILL; what follows is heard as of any other death."""
        if self.pid is not None and not self.exit:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def _hear(self, message: Message, body: memoryview) -> None:
        if isinstance(message, Answer):
            taken = self.held.popleft()
            if self.held:
                self.held[0].began = time.monotonic()
            self._answered(self, taken, unpack(message.parts, body), message.seconds)
        elif isinstance(message, Hello):
            self.pid = message.pid
            self._met.set()
        elif isinstance(message, Verified):
            _settle(self._verified, None)
        elif isinstance(message, Ready):
            self.is_up = True
            _settle(self._ready, message)
        elif isinstance(message, Refused):
            self._fail(StartFailed(message.reason, message.is_mistake))

    def _end_of_link(self) -> None:
        self.is_up = False
        self.died_early = not self._ready.done()
        early = "a worker died while it started"
        self._fail(StartFailed(early) if self.pid is not None else Unborn("the process that forks workers died"))
        self._met.set()
        self._gone.set()
        self._lost(self)

    def _fail(self, error: StartFailed) -> None:
        for future in (self._verified, self._ready):
            if not future.done():
                future.set_exception(error)

    async def _reap(self) -> None:
        """Take note of how the process ended; it is this process's child."""
        while self.pid is not None and not self.exit:
            try:
                found, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                self.exit = "ended"
                return
            if found:
                self.exit = _how(os.waitstatus_to_exitcode(status))
                return
            await asyncio.sleep(REAP_SECONDS)


async def _within(seconds: float, event: asyncio.Event) -> None:
    """Wait for an event, not for ever. (`asyncio.wait_for` may lose a cancellation before Python 3.12.)"""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name}, which may be the system short of memory" if code == -signal.SIGKILL else name


def _settle(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)


def _look_at(future: asyncio.Future[Any]) -> None:
    """An error that nobody waits for is no news: the worker's end is told elsewhere."""
    if not future.cancelled():
        future.exception()

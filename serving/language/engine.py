"""An engine's process, seen from the front: requests go in, parts of answers come out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from serving.bundle import Bundle
from serving.errors import BadInput, Mistake, ServingError
from serving.language.messages import (
    LENGTH,
    Ask,
    Begun,
    Cancel,
    Denied,
    Load,
    Message,
    Part,
    Ready,
    Refused,
    Step,
    decode,
    encode,
)
from serving.language.settings import LanguageSettings
from serving.workers.errors import DeadlineExceeded, WorkerLost

RETRY_AFTER = 2.0
"""Seconds after which a lost engine may be there again."""
END_SECONDS = 5.0


class Answer:
    """One answer while it is made. Close it when nobody wants it any more."""

    def __init__(self, engine: Engine, number: int) -> None:
        self._engine, self._number = engine, number
        self._items: asyncio.Queue[Any] = asyncio.Queue()
        self._timer: asyncio.TimerHandle | None = None
        self.prompt_tokens = 0

    @property
    def version(self) -> str:
        """Of the bundle that answers."""
        return self._engine.bundle.version

    async def begun(self) -> None:
        """Until the prompt was found good. Raises BadInput, WorkerLost, DeadlineExceeded."""
        item = await self._items.get()
        if isinstance(item, Exception):
            raise item
        assert isinstance(item, Begun)
        self.prompt_tokens = item.prompt_tokens

    async def parts(self) -> AsyncIterator[Part]:
        """What each step brings, to the end. Raises WorkerLost, DeadlineExceeded."""
        while True:
            item = await self._items.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if item.finish is not None:
                return

    def close(self) -> None:
        """Free the answer's place in the engine, where it still has one. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._engine.forget(self._number)

    def put(self, item: Any) -> None:
        """From the engine."""
        self._items.put_nowait(item)

    def end_at(self, deadline: float) -> None:
        """DeadlineExceeded comes at this time of the loop, if the answer is not whole by then."""
        self._timer = asyncio.get_running_loop().call_at(deadline, self._late)

    def _late(self) -> None:
        self.put(DeadlineExceeded("the answer was not there by the request's deadline"))
        self.close()


class Engine:
    """One process with one version of a model."""

    def __init__(self, name: str, bundle: Bundle, settings: LanguageSettings) -> None:
        self.name, self.bundle, self.settings = name, bundle, settings
        self.ready: Ready | None = None
        self.lost = asyncio.Event()
        """Set when the process is gone, or about to go."""
        self.running = self.waiting = 0
        self._answers: dict[int, Answer] = {}
        self._empty = asyncio.Event()
        self._empty.set()
        self._next = 0
        self._heard = 0.0
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._listening: asyncio.Task[None] | None = None

    @property
    def outstanding(self) -> int:
        """Requests that it holds."""
        return len(self._answers)

    @property
    def pid(self) -> int | None:
        """Of the process."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> Ready:
        """Start the process and wait until it answers as in training. Raises ServingError with its reason."""
        ours, theirs = socket.socketpair()
        settings = self.settings
        threads = settings.threads_used()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", f"serving.language.{settings.worker()}", str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                env={**os.environ, **_environment(threads)},
            )
        finally:
            theirs.close()
        ours.setblocking(False)
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._send(
            Load(
                path=str(self.bundle.path),
                version=self.bundle.version,
                threads=threads,
                device=settings.device,
                max_rows=settings.max_rows,
                cells=settings.kv_tokens,
                chunk=settings.chunk,
            )
        )
        try:
            async with asyncio.timeout(settings.start_seconds):
                found = await _receive(reader)
        except (EOFError, OSError) as error:
            await self.kill()
            raise ServingError(f"{self.name}: its engine ended while it was loading; see the log") from error
        except TimeoutError as error:
            await self.kill()
            raise ServingError(f"{self.name}: its engine was not ready after {settings.start_seconds:g} s") from error
        except asyncio.CancelledError:
            await self.kill()
            raise
        if isinstance(found, Refused):
            await self.kill()
            raise (Mistake if found.is_mistake else ServingError)(found.reason)
        assert isinstance(found, Ready)
        self.ready = found
        self._listening = asyncio.create_task(self._listen(reader), name=f"engine of {self.name}")
        return found

    def ask(self, ask: Ask, deadline: float) -> Answer:
        """Hand a request over; its number is given here. Raises WorkerLost where the process is gone."""
        if self.lost.is_set() or self._writer is None:
            raise self._lost_error()
        if not self._answers:
            self._heard = asyncio.get_running_loop().time()
        self._next += 1
        self._send(msgspec.structs.replace(ask, id=self._next))  # first: what can't be sent must not be waited for
        answer = Answer(self, self._next)
        self._answers[self._next] = answer
        self._empty.clear()
        answer.end_at(deadline)
        return answer

    def forget(self, number: int) -> None:
        """Nobody wants this answer any more, or it is whole."""
        if self._answers.pop(number, None) is not None and not self.lost.is_set():
            self._send(Cancel(number))
        if not self._answers:
            self._empty.set()

    def is_hung(self, now: float) -> bool:
        """It holds requests and has said nothing for too long."""
        return bool(self._answers) and now - self._heard > self.settings.hang_seconds

    async def drain(self, seconds: float) -> None:
        """Until it holds no request, or the time is up."""
        try:
            async with asyncio.timeout(seconds):
                await self._empty.wait()
        except TimeoutError:
            pass  # what is left is told by `stop`

    async def stop(self) -> None:
        """End the process; requests that it still holds get WorkerLost."""
        if self._writer is not None:
            self._writer.close()  # the process ends by itself
        if self._process is not None:
            try:
                async with asyncio.timeout(END_SECONDS):
                    await self._process.wait()
            except TimeoutError:
                await self.kill()
        self._fail_all()

    async def kill(self) -> None:
        """End the process at once."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        if self._process is not None:
            await self._process.wait()
        if self._writer is not None:
            self._writer.close()
        self._fail_all()

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                message = await _receive(reader)
                self._heard = loop.time()
                if isinstance(message, Step):
                    self.running, self.waiting = message.running, message.waiting
                    for part in message.parts:
                        self._give(part.id, part, part.finish is not None)
                elif isinstance(message, Begun):
                    self._give(message.id, message, False)
                elif isinstance(message, Denied):
                    self._give(message.id, BadInput(message.field, message.message), True)
        except (EOFError, OSError, msgspec.DecodeError):
            self._fail_all()

    def _give(self, number: int, item: Any, is_last: bool) -> None:
        answer = self._answers.get(number)
        if answer is None:  # given up meanwhile
            return
        answer.put(item)
        if is_last:
            del self._answers[number]  # the engine has forgotten it, too
            answer.close()

    def _fail_all(self) -> None:
        self.lost.set()
        answers, self._answers = list(self._answers.values()), {}
        for answer in answers:
            answer.put(self._lost_error())
            answer.close()
        self._empty.set()
        self.running = self.waiting = 0

    def _lost_error(self) -> WorkerLost:
        return WorkerLost("the process that was to answer has ended; try again", RETRY_AFTER)

    def _send(self, message: Message) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode(message))


async def _receive(reader: asyncio.StreamReader) -> Any:
    """Raises EOFError where the process is gone."""
    length = LENGTH.unpack(await reader.readexactly(LENGTH.size))[0]
    return decode(await reader.readexactly(length))


def _environment(threads: int) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(threads),
        # Threads that spin while they wait for the next token take the cores from those who have work.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }

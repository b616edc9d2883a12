"""A version that answers requests: a bundle that the front serves in a process of its own, or a URL."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from serving.bundle import Bundle
from serving.errors import Mistake

if TYPE_CHECKING:
    import aiohttp

POLL_SECONDS = 0.5
"""Between two looks at `/ready`."""
STARTING_POLL_SECONDS = 0.1
PROBE_SECONDS = 5.0
PATIENCE = 4
"""Looks at `/ready` without any answer before a version is taken to be gone: one may meet a busy moment."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before a process that ended is started again; doubled each time."""
KILL_AFTER = 35.0
"""Seconds that a server may take to drain after SIGTERM; its own bound is 30."""
Say = Callable[[str], None]


class Version:
    """One version, with what the front knows of it."""

    def __init__(
        self, source: str, server: Sequence[str], options: Sequence[str], logs: Path, session: aiohttp.ClientSession
    ) -> None:
        self.source = source
        """The bundle's folder or the URL, as it was given."""
        self.is_url = source.startswith(("http://", "https://"))
        self.bundle = None if self.is_url else Bundle.read(source)
        self.name = self.bundle.version if self.bundle is not None else source
        self.url = _checked_url(source) if self.is_url else ""
        self.ready = False
        self.reason = "not started"
        self.crashes = 0
        self.unready_since: float | None = None
        self.was_ready = False
        self.in_flight = 0
        self.changed = asyncio.Event()
        self._server, self._options, self._logs, self._session = [*server], [*options], logs, session
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self._ending = False

    @property
    def unready_seconds(self) -> float:
        """How long it has not been ready at a stretch."""
        return time.monotonic() - self.unready_since if self.unready_since is not None else 0.0

    @property
    def pid(self) -> int | None:
        """Of its process, where it is ours and runs."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    def start(self, say: Say) -> None:
        """Start it and keep it running; returns at once, see `ready`."""
        self.unready_since = time.monotonic()
        self._watch = asyncio.create_task(self._keep(say) if not self.is_url else self._look())

    async def wait_ready(self, seconds: float) -> bool:
        """Whether it got ready in time."""
        deadline = time.monotonic() + seconds
        while not self.ready and (left := deadline - time.monotonic()) > 0 and not self._ending:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), min(left, 1.0))
        return self.ready

    async def stop(self) -> None:
        """Wait for the requests under way, then end the process; a URL is left as it is."""
        self._ending = True
        deadline = time.monotonic() + KILL_AFTER
        while self.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        await self._end()
        self._set(False, "ended")

    async def _keep(self, say: Say) -> None:
        pause = FIRST_PAUSE
        while True:
            await self._spawn()
            began = time.monotonic()
            looking = asyncio.create_task(self._look())
            try:
                assert self._process is not None
                code = await self._process.wait()
            finally:
                looking.cancel()
            self.crashes += 1
            self._set(False, f"its process ended with {_told(code)}")
            pause = FIRST_PAUSE if time.monotonic() - began > 60.0 else min(pause * 2.0, LONGEST_PAUSE)
            say(f"{self.name}: {self.reason}; it is started again in {pause:g} s (its log: {self._log()})")
            await asyncio.sleep(pause)

    async def _spawn(self) -> None:
        self._logs.mkdir(parents=True, exist_ok=True)
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        program = [*self._server, self.source, "--host", "127.0.0.1", "--port", str(port), *self._options]
        line = [sys.executable, "-m", "serving.rollout.tether", str(os.getpid()), *program]
        with self._log().open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *line, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    async def _end(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), KILL_AFTER)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()

    async def _look(self) -> None:
        """Ask `/ready` again and again."""
        silent = 0
        while True:
            said = await self._ask()
            silent = silent + 1 if said is None else 0
            if said is not None:
                self._set(said == "", said or "ready")
            elif silent >= PATIENCE or not self.ready:
                self._set(False, "it does not answer /ready")
            await asyncio.sleep(POLL_SECONDS if self.ready else STARTING_POLL_SECONDS)

    async def _ask(self) -> str | None:
        """Empty where it is ready, else why not; None without an answer."""
        import aiohttp

        try:
            timeout = aiohttp.ClientTimeout(total=PROBE_SECONDS)
            async with self._session.get(f"{self.url}/ready", timeout=timeout) as answer:
                return "" if answer.status == 200 else f"/ready answers {answer.status}"
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None

    def _set(self, ready: bool, reason: str) -> None:
        if ready:
            self.unready_since, self.was_ready = None, True
        elif self.ready or self.unready_since is None:
            self.unready_since = time.monotonic()
        self.ready, self.reason = ready, reason
        self.changed.set()
        self.changed = asyncio.Event()

    def _log(self) -> Path:
        return self._logs / f"{self.name}.log"


def _checked_url(text: str) -> str:
    parts = urlsplit(text)
    if not parts.hostname or parts.query or parts.fragment or parts.username:
        raise Mistake(f"{text}: wanted a version's URL such as http://127.0.0.1:8001, without a query or a password")
    return text.rstrip("/")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _told(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

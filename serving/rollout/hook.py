"""A command that is told of promotions and rollbacks, until it succeeds; the traffic never waits for it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 300.0
SECONDS = 120.0
"""For one attempt."""


class Hook:
    """Runs `command` with one JSON object as its last argument: `{"event", "source", "version", "run"}`.

    Only the newest event counts: who comes back from a failure need not learn what held in between.
    """

    def __init__(self, command: Sequence[str], tell: Callable[[str, dict[str, Any]], None]) -> None:
        self._command, self._tell = [*command], tell
        self.pending: dict[str, Any] | None = None
        """What is still to be told; survives with the state."""
        self._task: asyncio.Task[None] | None = None

    def notify(self, event: dict[str, Any] | None) -> None:
        """Begin to tell of an event; None where there is none to take up."""
        if event is None or not self._command:
            return
        self.pending = event
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._deliver())

    async def close(self) -> None:
        """Leave what is pending to the next process."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _deliver(self) -> None:
        pause, told = FIRST_PAUSE, ""
        while (event := self.pending) is not None:
            failure = await self._attempt(event)
            if failure is None:
                if self.pending is event:
                    self.pending = None
                self._tell("hook", {"event": event["event"], "version": event["version"], "ok": True})
                pause, told = FIRST_PAUSE, ""
                continue
            if failure != told:  # the same again is no news
                self._tell(
                    "hook", {"event": event["event"], "version": event["version"], "ok": False, "error": failure}
                )
                told = failure
            await asyncio.sleep(pause)
            pause = min(pause * 2.0, LONGEST_PAUSE)

    async def _attempt(self, event: dict[str, Any]) -> str | None:
        """None once it has succeeded, else the last line of what it said."""
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                json.dumps(event),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
        except OSError as error:
            return f"{self._command[0]}: {error.strerror}"
        try:
            output, _ = await asyncio.wait_for(process.communicate(), SECONDS)
        except TimeoutError:
            return f"no end within {SECONDS:g} s"
        finally:
            if process.returncode is None:
                process.kill()
        if process.returncode == 0:
            return None
        lines = output.decode(errors="replace").strip().splitlines()
        return lines[-1][:500] if lines else f"exit code {process.returncode}"

"""A signal sets a flag; the loop looks at it between two steps. Nothing is saved in a handler."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

ECHO_SECONDS = 2.0
"""A scheduler signals every process of a job, and torchrun passes on what it gets: one wish may arrive twice."""


class Preemption:
    """Flag of a wish to stop; a second signal (but for an echo of the first) ends the process at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._received = 0.0
        self._previous: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        return self.signal_name is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self._received = time.monotonic()  # first: the echo may come between these two lines
            self.signal_name = signal.Signals(number).name
        elif number == signal.SIGINT or time.monotonic() - self._received > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def __enter__(self) -> Preemption:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def ignore_signals() -> None:
    """For a process that is about to end as preempted: a launcher that sees another rank end sends one signal more,
    which must not change this one's exit code."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

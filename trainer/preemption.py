"""A signal sets a flag; the loop looks at it between two steps. Nothing is saved in a handler."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""From a scheduler: a wish to stop, from the first moment on."""

ECHO_SECONDS = 2.0
"""A scheduler signals every process of a job, and torchrun passes on what it gets: one wish may arrive twice."""


class Preemption:
    """Flag of a wish to stop; a second signal (but for an echo of the first) ends the process at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._received = 0.0
        self._ends = False
        self._previous: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        return self.signal_name is not None

    def take_interrupts(self) -> None:
        """From now on Ctrl-C is a wish to stop, too; before there was something to save, it ended the process."""
        self._take(signal.SIGINT)

    def take_back(self) -> None:
        """Take all signals again: a library that was started in between (Ray) has put handlers of its own there."""
        for number in self._previous:
            signal.signal(number, self._handle)

    def end(self) -> None:
        """The wish is fulfilled: from here to the end of the process no further signal changes its exit code.

        A launcher that sees another rank end sends one more."""
        self._ends = True

    def _take(self, number: signal.Signals) -> None:
        if number not in self._previous:
            self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._ends:
            return
        if not self.requested:
            self._received = time.monotonic()  # first: the echo may come between these two lines
            self.signal_name = signal.Signals(number).name
        elif number == signal.SIGINT or time.monotonic() - self._received > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def __enter__(self) -> Preemption:
        for number in SIGNALS:
            self._take(number)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items() if not self._ends else ():
            signal.signal(number, handler)  # type: ignore[arg-type]


def ignore_signals() -> None:
    """For a process that is about to end as preempted, and whose interpreter is closing down: see `Preemption.end`."""
    for number in (*SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

"""Which process ends with which, and who hears of it. Linux only; elsewhere a worker ends when its socket is closed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # <sys/prctl.h>
OF_THE_TERMINAL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that reach a whole group of processes; the front alone acts on them."""


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; ends it at once where that is not `parent` any more."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans(on: bool) -> None:
    """Become the parent of descendants whose own parent ends, or do so no longer."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(on))


def ignore_the_terminal() -> None:
    """Leave Ctrl-C and the like to the front, which lets requests finish first."""
    for number in OF_THE_TERMINAL:
        signal.signal(number, signal.SIG_IGN)

"""Waiting for a moment within gevent, to a tenth of a millisecond where the system can."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from contextlib import suppress

import gevent

NONBLOCKING_CLOEXEC = 0o4000 | 0o2000000
READ = 1
ABSOLUTE = 1


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


class _Setting(ctypes.Structure):
    _fields_ = [("interval", _Timespec), ("value", _Timespec)]


class Alarm:
    """Wakes one greenlet when `time.monotonic()` reaches a moment.

    The event loop's own timers are rounded up to whole milliseconds, which is as long as a quick answer takes. On
    Linux a timer's file descriptor has no such grain.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
        self._fd = self._libc.timerfd_create(time.CLOCK_MONOTONIC, NONBLOCKING_CLOEXEC) if self._libc else -1
        self._hub = gevent.get_hub()
        self._watcher = self._hub.loop.io(self._fd, READ) if self._fd >= 0 else None

    def wait_until(self, moment: float) -> None:
        if self._libc is None or self._watcher is None:
            gevent.sleep(max(0.0, moment - time.monotonic()))
            return
        nanoseconds = max(1, int(moment * 1e9))
        setting = _Setting(_Timespec(0, 0), _Timespec(*divmod(nanoseconds, 1_000_000_000)))
        self._libc.timerfd_settime(self._fd, ABSOLUTE, ctypes.byref(setting), None)
        self._hub.wait(self._watcher)
        with suppress(BlockingIOError):  # woken for another reason: the caller looks at the clock
            os.read(self._fd, 8)

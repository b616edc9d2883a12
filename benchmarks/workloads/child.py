"""A contender as a process of its own: its peak memory by the kernel's own account, its output in a file."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path


def run(command: Sequence[str | Path], environment: Mapping[str, str], log: Path, patience: float) -> int:
    """Run to the end; returns the most memory that was resident at once, bytes.

    It is that of the process, or of the largest that it waited for, from its start to its end (`ru_maxrss`). Raises
    RuntimeError with the end of its output where it fails or takes more than `patience` seconds.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that the end reaches its children, too
        )
        timer = threading.Timer(patience, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            timer.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}:\n{log.read_text(errors='replace')[-3000:]}")
    return usage.ru_maxrss * 1024

"""Ends a local Ray with its driver, however that one ends: `python -m trainer.search.guardian FD MARK FOLDER`.

Ray's own processes notice a driver that was killed late, or not at all when they were still starting. This process
waits until the pipe FD is closed, which the kernel does for a dead driver too, then kills everything that has MARK in
its environment and removes FOLDER.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

VARIABLE = "TRAINER_LOCAL_RAY"
"""Set while Ray is started, so that all its processes have it, and what they start."""
PATIENCE = 30.0
LOOK_SECONDS = 0.05
QUIET_LOOKS = 3
"""So many looks in a row find nobody: one that was just being started would have been seen."""


class Guardian:
    """The guardian seen from the driver."""

    def __init__(self, mark: str, folder: str) -> None:
        reads, self._writes = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trainer.search.guardian", str(reads), mark, folder],
            pass_fds=[reads],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(reads)

    def close(self) -> None:
        """Have it do its work, and wait for that."""
        os.close(self._writes)
        self._process.wait()


def marked(mark: str) -> list[int]:
    """Processes of this user that have `VARIABLE=mark` in their environment and have not ended (Linux)."""
    wanted = f"{VARIABLE}={mark}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_ours = wanted in (path / "environ").read_bytes().split(b"\0")
            if is_ours and (path / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                found.append(int(path.name))
        except OSError:  # ended in the meantime, or of another user
            continue
    return found


def sweep(mark: str) -> None:
    """Kill all that are marked, until there is nobody left."""
    deadline, quiet = time.monotonic() + PATIENCE, 0
    while quiet < QUIET_LOOKS and time.monotonic() < deadline:
        there = [pid for pid in marked(mark) if pid != os.getpid()]
        quiet = 0 if there else quiet + 1
        for pid in there:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(LOOK_SECONDS)


def main(descriptor: int, mark: str, folder: str) -> None:
    """Wait for the end of the driver, then tidy up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(descriptor, 1):
        pass
    sweep(mark)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])

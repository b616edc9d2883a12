"""Ends a local Ray with its driver, however that one ends: `python -m trainer.search.guardian FD MARK FOLDER`.

Ray's own processes notice a driver that was killed late, or not at all when they were still starting. This process
waits until the pipe FD is closed, which the kernel does for a dead driver too, then kills everything that has MARK in
its environment, or is Ray's and has a file open in FOLDER, and removes FOLDER.
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


def members(mark: str, folder: str) -> list[int]:
    """Processes of this user that belong to the local Ray and have not ended (Linux).

    They have `VARIABLE=mark` in their environment. Ray's own write their titles over it: those have files in `folder`.
    """
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                continue
            if _is_marked(path, mark) or (_is_rays(path) and _has_file_in(path, folder)):
                found.append(int(path.name))
        except OSError:  # ended in the meantime, or of another user
            continue
    return found


def _is_marked(process: Path, mark: str) -> bool:
    return f"{VARIABLE}={mark}".encode() in (process / "environ").read_bytes().split(b"\0")


def _is_rays(process: Path) -> bool:
    command = (process / "cmdline").read_bytes()
    return command.startswith(b"ray::") or b"/ray/" in command


def _has_file_in(process: Path, folder: str) -> bool:
    return any(os.readlink(link).startswith(f"{folder}/") for link in (process / "fd").iterdir())


def sweep(mark: str, folder: str) -> None:
    """Kill all that belong to it, until there is nobody left."""
    deadline, quiet = time.monotonic() + PATIENCE, 0
    while quiet < QUIET_LOOKS and time.monotonic() < deadline:
        there = [pid for pid in members(mark, folder) if pid != os.getpid()]
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
    sweep(mark, folder)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])

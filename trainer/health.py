"""A heartbeat for each rank: where it is, on one line of a file that outlives it. No torch.

`RUN/health/rank-3` begins with `<step> <phase> <unix seconds>`, written in place through mapped memory: a beat costs a
microsecond and no system call, others on this host see it at once, and it is still there after SIGKILL. The second
line says who writes: `<host> <pid> <start of the process>`.
"""

from __future__ import annotations

import mmap
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from trainer import environment

PHASES = ("set-up", "data", "forward", "backward", "exchange", "step", "log", "evaluate", "save", "test", "end")
"""What a rank may be doing, in the order of a step."""
FOLDER = "health"
PULSE_SECONDS = 5.0
"""At most so old is the file of a rank that lives: hosts that share a file system see no mapped memory."""
_BEAT = b"%12d %-9b %17.6f\n"


class Heartbeat:
    """This rank's own sign of life."""

    def __init__(self, folder: Path, rank: int) -> None:
        """Makes `folder/health/rank-<rank>` for this process."""
        path = folder / FOLDER / f"rank-{rank}"
        path.parent.mkdir(exist_ok=True)
        pid = os.getpid()
        identity = f"{environment.host()} {pid} {environment.process_started(pid)}\n".encode()
        self.step = 0
        self.phase = "set-up"
        self.at = time.monotonic()
        first = _BEAT % (0, b"set-up", time.time())
        # Real bytes before they are mapped: a write into a hole of a full disk would end the process (SIGBUS).
        path.write_bytes(first + identity)
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._end = len(first)

    def beat(self, phase: str) -> None:
        """This rank begins `phase`."""
        self.phase, self.at = phase, time.monotonic()
        self._map[: self._end] = _BEAT % (self.step, phase.encode(), time.time())

    def pulse(self) -> None:
        """Show other hosts that this one lives, whatever its phase."""
        self._map.flush()


@dataclass(frozen=True)
class Sign:
    """The last sign of life of a rank."""

    rank: int
    step: int
    """Optimizer steps it had done."""
    phase: str
    at: float
    """Unix time of the beginning of the phase."""
    host: str
    pid: int
    process_started: int | None

    @property
    def is_gone(self) -> bool:
        """Whether its process ended on this host without having said so."""
        is_here = self.host == environment.host() and self.phase != "end"
        return is_here and not environment.alive(self.pid, self.process_started)

    @property
    def where(self) -> str:
        """What it did last, for a message."""
        return f"rank {self.rank} (process {self.pid} on {self.host}), step {self.step + 1}, phase {self.phase}"

    @property
    def place(self) -> tuple[int, int, float]:
        """Sorts ranks: the one that is behind first."""
        return self.step, PHASES.index(self.phase), self.at


def read(folder: Path, rank: int) -> Sign | None:
    """The last sign of a rank; None where it never gave one."""
    try:
        beat, identity = (folder / FOLDER / f"rank-{rank}").read_text().splitlines()[:2]
        step, phase, at = beat.split()
        host, pid, started = identity.split()
        known = phase if phase in PHASES else "set-up"
        return Sign(rank, int(step), known, float(at), host, int(pid), None if started == "None" else int(started))
    except (OSError, ValueError):  # not there yet, or read in the middle of a change
        return None


def clear(folder: Path) -> None:
    """Forget the signs of earlier attempts; before any rank of this one gives its own."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)

"""How a model is served: how many processes, how large a batch, how long a queue."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Settings:
    """Of one model; seconds, samples, bytes."""

    workers: int = 1
    """Processes that run the model."""
    threads: int | None = None
    """Of each process; by default the cores, shared out evenly, or 1 where a model is light (see `process`)."""
    cores: int | None = None
    """To share out, by default all that this process may use: a share that is granted without a bound can't be seen."""
    max_batch: int = 32
    """Samples that run at once; a bundle's own limit holds, too."""
    max_wait: float = 0.0
    """Seconds that a free worker waits for a batch to fill. 0: it takes at once what is there."""
    queue: int = 512
    """Samples that may wait."""
    queue_bytes: int = 512 << 20
    """Bytes that may wait."""
    batch_bytes: int = 64 << 20
    """A batch takes no further sample past this size."""
    drain_seconds: float = 30.0
    """How long an old version may take to answer what it holds after a reload."""
    hang_seconds: float = 10.0
    """A worker that has not answered this long after the last deadline in its batch is killed."""
    start_seconds: float = 600.0
    """How long a worker may take to load, replay and warm up."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: CUDA where there is a device. CUDA is torch's own path and has not been run by us."""

    def threads_each(self) -> int:
        """Threads of each worker, at most."""
        return self.threads or max(1, (self.cores or cores()) // self.workers)


def cores() -> int:
    """Cores that this process may use: its affinity, and its container's share of CPU time where that is less."""
    count = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota = _quota()
    return count if quota is None else max(1, min(count, int(quota + 0.5)))


def _quota() -> float | None:
    """Cores' worth of CPU time that the control group grants; None where there is no bound."""
    try:
        granted, period = (_CGROUP / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            granted = (_CGROUP / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (_CGROUP / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    return int(granted) / int(period) if granted.isdecimal() and int(period) > 0 else None

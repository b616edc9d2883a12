"""Where a run takes place: host, process, platform, installed distributions. Read without importing any of them."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import socket
import sys
from pathlib import Path

PACKAGES = (
    "yaml-trainer",
    "torch",
    "torchvision",
    "lightning",
    "torchmetrics",
    "numpy",
    "albumentations",
    "pydantic",
    "mlflow",
    "transformers",
    "peft",
    "bitsandbytes",
    "timm",
    "ray",
)
"""Distributions whose versions stand in `run.json`; `environment.txt` lists all."""

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>

INFO_FOLDER = re.compile(r"(?P<name>[^-]+)-(?P<version>[^-]+)(-[^-]+)?\.(dist-info|egg-info)$")


def distributions() -> dict[str, str]:
    """Version of each installed distribution by its normalised name, sorted.

    Reads names of `*.dist-info` only: `importlib.metadata.distributions()` opens every METADATA file, which
    costs 0.3 s of start-up for 170 distributions.
    """
    found: dict[str, str] = {}
    for folder in sys.path:
        try:
            names = os.listdir(folder or ".")
        except OSError:  # zip files and folders that are gone are normal members of sys.path
            continue
        for name in names:
            match = INFO_FOLDER.match(name)
            if match:
                found.setdefault(re.sub(r"[-_.]+", "-", match["name"]).lower(), match["version"])
    return dict(sorted(found.items()))


def versions(installed: dict[str, str]) -> dict[str, str]:
    """Python's version and those of the distributions that shape the numbers."""
    known = {name: installed[name] for name in PACKAGES if name in installed}
    return {"python": platform.python_version(), **known}


def host() -> str:
    """Name of this machine (of the container, inside one)."""
    return socket.gethostname()


def process_started(pid: int) -> int | None:
    """Start of a process in clock ticks since boot: tells a process from a later one with the same pid.

    None where there is no such process, or the system doesn't tell (all but Linux).
    """
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def _stat(pid: int) -> list[str]:
    """The fields of `/proc/PID/stat` from the state on; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def alive(pid: int, started: int | None) -> bool:
    """Whether the process that had `pid` and began at `started` (see `process_started`) still runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process: it exists
        pass
    fields = _stat(pid)
    if fields and fields[0] in "ZX":  # it ended, and nobody asked: in a container without an init this lasts
        return False
    return started is None or not fields or int(fields[19]) == started


def signal_at_parents_end(number: int, parent: int | None = None) -> None:
    """Have the kernel send this process signal `number` when the process that started it ends (Linux only).

    Ends this process at once where `parent`, the one that started it, is gone already.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if parent is not None and os.getppid() != parent:
        os._exit(1)

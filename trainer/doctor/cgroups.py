"""What the control groups of Linux grant this process, both versions of them. Elsewhere, and without any: nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
_UNLIMITED = 2**60
"""Version 1 has no word for `no limit` on memory; it shows the largest number of pages instead."""


@dataclass(frozen=True)
class Grant:
    """A limit, and how much of it is used by all processes of the group together."""

    limit: int
    used: int

    @property
    def free(self) -> int:
        return max(self.limit - self.used, 0)


def cpu_quota(root: Path = ROOT) -> float | None:
    """Cores' worth of time that this process and its group may use, e.g. 1.5; None where nothing limits it."""
    quotas = []
    for folder in _folders("cpu", root):
        quota, period = [*(_text(folder / "cpu.max") or "").split(), "", ""][:2]
        quota = quota or _text(folder / "cpu.cfs_quota_us") or ""
        period = period or _text(folder / "cpu.cfs_period_us") or ""
        if quota.isdecimal() and period.isdecimal() and int(period):  # neither "max" nor -1
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory(root: Path = ROOT) -> Grant | None:
    """Bytes of memory, of the group that has least left; file cache that can be dropped doesn't count as used."""
    grants = []
    for folder in _folders("memory", root):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        if limit is None or limit >= _UNLIMITED:
            continue
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
        cache = dict(line.split() for line in (_text(folder / "memory.stat") or "").splitlines())
        droppable = int(cache.get("total_inactive_file", cache.get("inactive_file", 0)))
        grants.append(Grant(limit, max(used - droppable, 0)))
    return min(grants, key=lambda grant: grant.free, default=None)


def processes(root: Path = ROOT) -> Grant | None:
    """Processes and threads, of the group that has fewest left."""
    grants = [
        Grant(limit, _number(folder / "pids.current") or 0)
        for folder in _folders("pids", root)
        if (limit := _number(folder / "pids.max")) is not None
    ]
    return min(grants, key=lambda grant: grant.free, default=None)


def _folders(controller: str, root: Path) -> list[Path]:
    """The process's own group of a controller, and all above it: each of them may limit."""
    mount, path = root / "sys/fs/cgroup", ""
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, found = line.split(":", 2)
        if controller in controllers.split(","):  # version 1, alone or beside version 2
            mount, path = root / "sys/fs/cgroup" / controller, found
            break
        if not controllers:
            path = found
    own = mount / path.lstrip("/")
    # A container may see its path on the host, which is not there: its own group is then the root of the mount.
    own = own if own.is_dir() else mount
    return [own, *(folder for folder in own.parents if folder.is_relative_to(mount))]


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text is not None and text.isdecimal() else None


def _text(path: Path) -> str | None:
    """What a file of the kernel says; None where this kernel has no such file."""
    try:
        return path.read_text().strip()
    except OSError:
        return None

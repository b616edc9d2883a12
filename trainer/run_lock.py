"""One job on a run directory at a time: a lock that names its holder, and signs of life where locks don't reach.

Rank 0 holds `RUN/.run.lock` from before its first change to the run directory until its end; the kernel frees it when
the process dies. Other hosts may see no lock (some network file systems keep it to the host): there the heartbeats in
`RUN/health/` decide. No torch.
"""

from __future__ import annotations

import json
import os
import sys
import time
import weakref
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainer import environment, health
from trainer.errors import UserError
from trainer.files import drop_lock, take_lock

LOCK = ".run.lock"
PATIENCE_SECONDS = 5.0
"""How long a lock is waited for: a job that was killed a moment ago may take as long to be gone."""
ALIVE_SECONDS = 60.0
"""A heartbeat that stood still for as long is that of a job that is gone."""
_held: set[int] = set()


class RunLock:
    """An exclusive lock on a run directory, held by this process until `release`, or until it is forgotten."""

    def __init__(self, descriptor: int) -> None:
        _held.add(descriptor)
        self._let_go = weakref.finalize(self, _release, descriptor, os.getpid())

    def release(self) -> None:
        """Let the next job in; may be called again."""
        self._let_go()


def acquire(folder: Path) -> RunLock:
    """Lock a run directory for this process; UserError names the process that keeps holding it.

    On a file system without locks nothing is held.
    """
    path = folder / LOCK
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not take_lock(descriptor):
            if time.monotonic() >= deadline:
                raise UserError(_held_by(folder))
            time.sleep(0.05)
        _sign(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return RunLock(descriptor)


def still_at_work(folder: Path, host: str, pid: int, since: str) -> str:
    """The line for a second job on a run directory."""
    return (
        f"{folder}: process {pid} on {host} is still working on this run, since {since}; wait for its end, or stop it "
        f"(kill {pid} on {host}: it saves first)"
    )


def wait_for_silence(folder: Path, say: Callable[[str], None]) -> None:
    """Return once no rank of an earlier job gives signs of life; UserError as soon as one does.

    For a record that says `running` on another host, whose processes can't be seen from here. Heartbeats that have not
    changed for a minute, by their file's time or while this waits, are of a job that is gone.
    """
    first = _signs(folder)
    if not first:
        return
    youngest = min(time.time() - modified for modified, _ in first.values())
    wait = ALIVE_SECONDS - max(youngest, 0.0)  # below 0 where the other host's clock is ahead
    if wait <= 0:
        return
    say(f"this run says it is at work on another host: waiting up to {wait:.0f} s for a sign of life")
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline:
        for rank, sign in _signs(folder).items():
            if sign != first.get(rank):
                raise UserError(_alive(folder, rank))
        time.sleep(min(0.5, wait / 10))


def _release(descriptor: int, owner: int) -> None:
    _held.discard(descriptor)
    if owner == os.getpid():
        drop_lock(descriptor)
        os.close(descriptor)


def _forget_in_child() -> None:
    """A forked data worker that outlives its killed job must not keep others out."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def _sign(descriptor: int) -> None:
    """Write the holder's name into the lock."""
    pid = os.getpid()
    holder = {
        "host": environment.host(),
        "pid": pid,
        "process_started": environment.process_started(pid),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv)[:500],
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _held_by(folder: Path) -> str:
    path = folder / LOCK
    try:
        holder: dict[str, Any] = json.loads(path.read_bytes())
        host, pid, since = str(holder["host"]), int(holder["pid"]), str(holder["since"])
        is_gone = host == environment.host() and not environment.alive(pid, holder["process_started"])
    except (OSError, ValueError, KeyError, TypeError):  # it has only just taken the lock, or could not sign it
        return f"{folder}: another process is working on this run ({path} is locked); wait for its end"
    if not is_gone:
        return still_at_work(folder, host, pid, since)
    keepers = _who_has_open(path)
    named = f"process {', '.join(map(str, keepers))}" if keepers else "a process"
    return (
        f"{folder}: process {pid}, which worked on this run since {since}, is gone, but {named} that it has left "
        "behind still holds the run; end that one (kill -9) and try again"
    )


def _who_has_open(path: Path) -> list[int]:
    """Processes of this user that have the file open; empty where the system does not tell (all but Linux)."""
    found = set()
    own = os.getpid()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if int(link.parts[2]) != own and os.path.samefile(link, path):
                found.add(int(link.parts[2]))
        except OSError:  # ended in the meantime, or of another user
            continue
    return sorted(found)


def _signs(folder: Path) -> dict[str, tuple[float, bytes]]:
    """Time and beginning of each rank's heartbeat file, see `health`."""
    found = {}
    for path in (folder / health.FOLDER).glob("rank-*"):
        if path.suffix:  # stacks of a hang
            continue
        try:
            found[path.name] = (path.stat().st_mtime, path.read_bytes()[:200])
        except OSError:  # removed in the meantime
            continue
    return found


def _alive(folder: Path, name: str) -> str:
    sign = health.read(folder, int(name.removeprefix("rank-"))) if name[5:].isdigit() else None
    where = sign.where if sign is not None else name
    return (
        f"{folder}: another job is still working on this run ({where}, is alive); wait for its end, or stop it there "
        "(kill: it saves first)"
    )

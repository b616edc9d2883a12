"""`trainer doctor`: the file system of the runs: room, speed, locks, renames, and its clock. No torch."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.doctor import GB, MB, Check, Setting, ok, problem, size, warning
from trainer.files import FULL, LOCKS_UNSUPPORTED, write_atomically
from trainer.health import PULSE_SECONDS

LITTLE_ROOM = 10 * GB
"""Five checkpoints (three newest, the best, one being written) of 150 million parameters with AdamW, 12 bytes each."""
NO_ROOM = 0.1 * GB
"""Below it not even a small network's checkpoints and logs fit."""
FEW_FILES, NO_FILES = 1000, 100
"""A run makes some thirty files, and each kept checkpoint about ten."""

PIECE = 4 * 1024 * 1024
PIECES_PER_SYNC = 4
TOTAL = 64 * 1024 * 1024
"""Bytes written and read back; a slow disk's test ends sooner, after `WRITE_SECONDS`."""
ROOM_TO_TRY = 4 * TOTAL
"""Nothing is tried on a disk so full that others could miss those bytes."""
WRITE_SECONDS = 3.0
SLOW = 30 * MB
"""Bytes per second. At this rate the checkpoint of 150 million parameters, 1.8 GB, takes a minute."""

CLOCK_OFF = 1.0
"""Seconds. From here on files that were just written may look settled, or settled ones new."""
CLOCK_WRONG = PULSE_SECONDS
"""Seconds. Half of the age at which a heartbeat file on another host is taken for that of a dead rank."""
_STA_UNSYNC = 0x0040  # <sys/timex.h>
_IN_MEMORY = ("tmpfs", "ramfs")


def room(setting: Setting) -> list[Check]:
    """Whether runs can be written, and how much fits."""
    name, folder = "runs folder", _existing(setting.runs_dir)
    where = str(setting.runs_dir.absolute())
    elsewhere = "give another one: --runs-dir FOLDER, runs_dir: in the config"
    if not folder.is_dir():
        return problem(name, f"{folder} is a file", elsewhere)
    try:
        with _own_folder(folder):
            pass
    except OSError as error:
        if error.errno not in FULL:
            return problem(name, f"{where} can't be written: {error.strerror}", f"make it writable, or {elsewhere}")
        return problem(name, f"{where} is full: {error.strerror}", f"delete old runs or checkpoints, or {elsewhere}")
    found = os.statvfs(folder)
    free, kind = found.f_bavail * found.f_frsize, _kind(folder)
    notes = ", ".join(filter(None, [kind, "" if setting.runs_dir.exists() else "not made yet"]))
    text = f"{where}{f' ({notes})' if notes else ''}: {size(free)} of {size(found.f_blocks * found.f_frsize)} free"
    delete = f"delete old runs or checkpoints, or {elsewhere}"
    if found.f_files and found.f_favail < FEW_FILES:  # btrfs has no fixed number, and says 0
        text += f", room for {found.f_favail:,} more files"
        return problem(name, text, delete) if found.f_favail < NO_FILES else warning(name, text, delete)
    if free < LITTLE_ROOM:
        return problem(name, text, delete) if free < NO_ROOM else warning(name, text, delete)
    if kind in _IN_MEMORY:
        return warning(name, f"{text}, but it is memory: gone when the machine restarts", elsewhere)
    return ok(name, text)


def speed(setting: Setting) -> list[Check]:
    """Write with fsync, drop from the cache, read back, compare."""
    name, folder = "disk speed", _existing(setting.runs_dir)
    found = os.statvfs(folder)
    if found.f_bavail * found.f_frsize < ROOM_TO_TRY:
        return warning(name, f"not measured: {size(ROOM_TO_TRY)} must be free for that", "see `runs folder`")
    piece = os.urandom(PIECE)  # noise, which no file system makes smaller
    try:
        # Without a name: nothing is left behind, whatever ends this process.
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            written, writing = _write(file.fileno(), piece)
            reading = read_back(file.fileno(), piece, written)
    except OSError as error:
        remedy = "see `runs folder`; or a quota is used up, or the disk fails (dmesg)"
        return problem(name, f"writing {size(TOTAL)} failed: {error.strerror}", remedy)
    if reading is None:
        return problem(
            name, f"what was written to {folder} is read back different", "don't train here: replace the disk"
        )
    rate = written / writing
    text = f"writes {size(rate)}/s with fsync, reads {size(written / reading)}/s ({size(written)} each)"
    if rate < SLOW:
        return warning(name, text, "save less often (checkpoint.every_minutes), or put the runs on a faster disk")
    return ok(name, text)


def _write(descriptor: int, piece: bytes) -> tuple[int, float]:
    """Bytes written, and the seconds that took."""
    start, written = time.perf_counter(), 0
    while written < TOTAL and time.perf_counter() - start < WRITE_SECONDS:
        for _ in range(PIECES_PER_SYNC):
            rest = memoryview(piece)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            written += len(piece)
        os.fsync(descriptor)
    return written, time.perf_counter() - start


def read_back(descriptor: int, piece: bytes, length: int) -> float | None:
    """Seconds that reading takes; None where other bytes come back."""
    if sys.platform == "linux":
        os.posix_fadvise(descriptor, 0, length, os.POSIX_FADV_DONTNEED)  # else it would be memory that is measured
    os.lseek(descriptor, 0, os.SEEK_SET)
    seconds = 0.0
    for _ in range(length // len(piece)):
        start = time.perf_counter()
        got = b""
        while len(got) < len(piece) and (more := os.read(descriptor, len(piece) - len(got))):
            got += more
        seconds += time.perf_counter() - start
        if got != piece:
            return None
    return seconds


def locks(setting: Setting) -> list[Check]:
    """Whether `flock` excludes a second holder, and a rename replaces a file that is being read."""
    name, folder = "file locks", _existing(setting.runs_dir)
    try:
        with _own_folder(folder) as own:
            state = _replaced(own / "replaced")
            excludes = _excludes(own / "lock")
    except OSError as error:
        return warning(name, f"not tried: {error.strerror}", "see `runs folder`")
    if state:
        remedy = "put the runs on a POSIX file system (ext4, XFS, NFS 4, Lustre): checkpoints rely on it"
        return problem(name, f"replacing a file by rename {state}", remedy)
    if excludes is None:
        return ok(name, "rename replaces at once; this system has no flock, so one writer is assumed")
    if excludes:
        return ok(name, "a lock keeps the second process out, a rename replaces at once")
    remedy = "never start two jobs on one run; mount with locks (NFS: local_lock=none, Lustre: -o flock)"
    return warning(name, "rename replaces at once, but locks (flock) have no effect here", remedy)


def _replaced(path: Path) -> str:
    """What is wrong with replacing a file that is open; empty where nothing is."""
    write_atomically(path, b"old")
    with path.open("rb") as reader:
        write_atomically(path, b"new")
        if reader.read() != b"old":
            return "changes it under a reader"
    return "" if path.read_bytes() == b"new" and not list(path.parent.glob(".replaced.*")) else "has no effect"


def _excludes(path: Path) -> bool | None:
    """Whether a held lock is refused to another; None where this system has no such call."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    with path.open("wb") as first, path.open("wb") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in LOCKS_UNSUPPORTED:
                return False
            raise
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def clock(setting: Setting) -> list[Check]:
    """Whether something keeps this host's clock right, and that of the runs' file system agrees."""
    folder = _existing(setting.runs_dir)
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            before = time.time()
            file.write(b"now")
            os.fsync(file.fileno())
            after, stamp = time.time(), os.fstat(file.fileno()).st_mtime
        off = difference(stamp, before, after)
    except OSError:  # said by the line about the folder
        off = None
    return judge_clock(synchronised(), off)


def difference(stamp: float, before: float, after: float) -> float:
    """Seconds by which a file's time lies outside of the time in which it was written; 0 within."""
    return max(stamp - after, 0.0) + min(stamp - before, 0.0)


def judge_clock(is_synchronised: bool | None, off: float | None) -> list[Check]:
    """The line for what the kernel says of its clock, and the seconds by which the file system's is ahead of it."""
    kernel = {True: "synchronised", False: "not synchronised, says the kernel", None: "the kernel doesn't say"}
    found = kernel[is_synchronised]
    if off is not None:
        apart = f"{abs(off):.1f} s {'ahead' if off > 0 else 'behind'}"
        found += f"; the runs' file system {f'is {apart}' if abs(off) > CLOCK_OFF else 'agrees'}"
        if abs(off) > CLOCK_OFF:
            remedy = "synchronise this host and the file server (chronyd, systemd-timesyncd)"
            return problem("clock", found, remedy) if abs(off) > CLOCK_WRONG else warning("clock", found, remedy)
    if is_synchronised is False:
        remedy = "start chronyd, ntpd or systemd-timesyncd: times of several nodes are compared"
        return warning("clock", found, remedy)
    return ok("clock", found)


class _Timex(ctypes.Structure):
    """`struct timex` up to the status; what follows is room for the rest."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        *((field, ctypes.c_long) for field in ("offset", "freq", "maxerror", "esterror")),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_long * 60),
    )


def synchronised() -> bool | None:
    """Whether the kernel's clock is kept by something (adjtimex(2)); None where it doesn't say."""
    if sys.platform != "linux":
        return None
    state = _Timex()  # modes 0: ask, set nothing
    answer = ctypes.CDLL(None).adjtimex(ctypes.byref(state))
    # -1: a container's seccomp profile may forbid even the question.
    return None if answer < 0 else not state.status & _STA_UNSYNC


def _existing(folder: Path) -> Path:
    """The folder, or where it would be made."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


@contextmanager
def _own_folder(folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=".trainer-doctor-", dir=folder) as own:
        path = Path(own, "written")
        path.write_bytes(b"x")
        yield Path(own)


def _kind(folder: Path) -> str:
    """The type of the file system, e.g. `ext4`; empty where it is not told."""
    import psutil

    resolved = folder.resolve()
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    return next((mounts[path] for path in (resolved, *resolved.parents) if path in mounts), "")

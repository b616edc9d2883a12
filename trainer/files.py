"""Files that survive a crash, a full disk and several writers: atomic replacement, and locks between processes."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.errors import TrainerError

try:
    import fcntl
except ImportError:  # Windows has none; a single writer is then assumed
    fcntl = None  # type: ignore[assignment]

LOCKS_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""What file systems without locks (some Lustre and FUSE mounts) answer."""
FULL = (errno.ENOSPC, errno.EDQUOT)
_REMEDIES = {
    **dict.fromkeys(FULL, "free space"),
    errno.EROFS: "make the file system writable",
    errno.EACCES: "give this user the right to write there",
    errno.EPERM: "give this user the right to write there",
    errno.ENOENT: "put the folder back",
    errno.ENOTDIR: "put the folder back",
    errno.ESTALE: "mount the file system anew",
    errno.EIO: "check the disk",
}


def remedy(error: OSError) -> str:
    """What a user can do about a file that can't be written or read, in a few words without a full stop."""
    return _REMEDIES.get(error.errno or 0, "see to that")


def reason(error: OSError) -> str:
    """The cause in the system's own words."""
    return error.strerror or str(error)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` so that a reader, or a crash at any moment, finds the old bytes or the new, never a mix."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            to_disk(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_with_reserve(path: Path, data: bytes, reserve: Path) -> None:
    """`write_atomically`; on a full disk the file `reserve`, written when there was room, becomes the new `path`.

    Its blocks are written over in place, so that nobody else can take the space in between.
    """
    try:
        write_atomically(path, data)
    except OSError as error:
        if error.errno not in FULL or not reserve.is_file() or len(data) > reserve.stat().st_size:
            raise
        with reserve.open("r+b", buffering=0) as file:
            file.write(data)
            file.truncate()
            to_disk(file.fileno())
        os.replace(reserve, path)
        sync(path.parent)


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, a file or a symbolic link (not what it points to), where it exists."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


_waits_for_disk = True


def leave_to_the_system() -> None:
    """From now on this process does not wait for the disk.

    A machine that crashes, though not a process, may then cost what was written in the last half minute. For runs that
    can be made again without a loss to anybody, as trials of a search can: a wait is 4 ms, and a run has a dozen.
    """
    global _waits_for_disk
    _waits_for_disk = False


def to_disk(descriptor: int) -> None:
    """Bring the bytes of an open file to the disk, see `leave_to_the_system`."""
    if _waits_for_disk:
        os.fsync(descriptor)


def sync(path: Path) -> None:
    """Bring a file's bytes, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        to_disk(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, timeout: float | None = None) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` (made where missing); the kernel frees it if the process dies.

    Raises TimeoutError when another process still holds it after `timeout` seconds (None waits for ever).
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not take_lock(descriptor, wait=deadline is None):
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"{path} is held by another process")
            time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def take_lock(descriptor: int, wait: bool = False) -> bool:
    """Lock an open file for this process; False where another holds it and this is not to `wait`.

    True on a file system without locks, too: there is nobody to ask.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in LOCKS_UNSUPPORTED:
            return True
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def drop_lock(descriptor: int) -> None:
    """Unlock, also for children that have inherited the descriptor: closing would leave the lock with them."""
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except OSError as error:
        if error.errno not in LOCKS_UNSUPPORTED:
            raise


def append_line(path: Path, entry: dict[str, Any], go_on: str = "trainer fit --resume") -> None:
    """Add an object to a JSON Lines file, and bring it to the disk. Raises TrainerError where that can't be done, which
    names the command that goes on with the folder."""
    try:
        with path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            to_disk(file.fileno())
    except OSError as error:
        raise TrainerError(
            f"{path} could not be written ({reason(error)}); {remedy(error)}, then: {go_on} {path.parent}"
        ) from error


def complete_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; a last line torn by a crash is cut off, or the next would be joined to it.

    Raises TrainerError for a line in the middle that is damaged.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        write_atomically(path, whole)
    entries = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            raise TrainerError(f"{path}:{number}: damaged line; delete it to go on") from error
    return entries

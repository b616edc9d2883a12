"""Files that survive a crash and several writers: atomic replacement, and locks between processes."""

from __future__ import annotations

import errno
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has none; a single writer is then assumed
    fcntl = None  # type: ignore[assignment]

LOCKS_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""What file systems without locks (some Lustre and FUSE mounts) answer."""


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` so that a reader, or a crash at any moment, finds the old bytes or the new, never a mix."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, as `fsync` does for a file's bytes."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, timeout: float | None = None) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` (made where missing); the kernel frees it if the process dies.

    Raises TimeoutError when another process still holds it after `timeout` seconds (None waits for ever).
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            _lock(
                descriptor,
                path,
                None if timeout is None else time.monotonic() + timeout,
            )
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path, deadline: float | None) -> None:
    while True:
        try:
            fcntl.flock(
                descriptor,
                fcntl.LOCK_EX if deadline is None else fcntl.LOCK_EX | fcntl.LOCK_NB,
            )
            return
        except OSError as error:
            if error.errno in LOCKS_UNSUPPORTED:
                return
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"{path} is held by another process") from error
        time.sleep(0.05)


def complete_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; a last line torn by a crash is cut off, or the next would be joined to it."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        write_atomically(path, whole)
    return [json.loads(line) for line in whole.splitlines()]

"""What is computed once and read again: folders named by a hash of what they were made from."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.errors import TrainerError
from trainer.files import FULL, locked, reason, remedy, remove, sync, write_atomically

_TABLE = "entry.json"
"""Written last: what it lists is whole."""


def cache_folder() -> Path:
    """`$TRAINER_CACHE`, else `~/.cache/trainer`; it may not exist yet."""
    return Path(os.environ.get("TRAINER_CACHE") or Path.home() / ".cache" / "trainer")


def kept(cache: Path, name: str, make: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any], bool]:
    """The entry `name` of `cache`: its folder, what `make` said about it, and whether it was made just now.

    `make` fills an empty folder and returns plain data about it. Of several processes one makes the entry, the others
    wait for it. The entry appears whole or not at all; one that was damaged since is made anew. An entry that is
    there is read without writing anything, so the cache may be a read-only one.

    Raises TrainerError where the folder can't be written.
    """
    folder = cache / name
    about = _about(folder)
    if about is not None:
        return folder, about, False
    with _told(cache):
        cache.mkdir(parents=True, exist_ok=True)
        lock = cache / f".{name}.lock"
    with _told(cache), locked(lock):
        about = _about(folder)
        if about is not None:
            return folder, about, False
        for left in cache.glob(f".{name}.making-*"):  # by a process that was killed: the lock is ours
            remove(left)
        return folder, _make(folder, make), True


def _make(folder: Path, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    remove(folder)
    making = folder.with_name(f".{folder.name}.making-{secrets.token_hex(6)}")
    making.mkdir()
    try:
        about = make(making)
        files = {file.name: file.stat().st_size for file in making.iterdir()}
        for file in files:
            sync(making / file)
        write_atomically(making / _TABLE, json.dumps({"files": files, "about": about}).encode())
        try:
            making.rename(folder)
        except OSError:
            # On a file system without locks another process may have made the same entry meanwhile.
            if _about(folder) is None:
                raise
        sync(folder.parent)
        return about
    finally:
        remove(making)


def _about(folder: Path) -> dict[str, Any] | None:
    """What was said about a whole entry; None where there is none."""
    try:
        table = json.loads((folder / _TABLE).read_bytes())
        whole = all((folder / file).stat().st_size == size for file, size in table["files"].items())
        return dict(table["about"]) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


@contextmanager
def _told(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        elsewhere = "with more room" if error.errno in FULL else "that can be written"
        raise TrainerError(
            f"the cache {cache} can't be written ({reason(error)}): {remedy(error)}, "
            f"or set TRAINER_CACHE to a folder {elsewhere}"
        ) from error

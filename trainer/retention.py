"""Which checkpoints stay: the newest, the best, and never fewer than one that has been read back. No torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trainer import checkpoint
from trainer.checkpoint import DamagedCheckpoint, NewerFormat


def clean_up(checkpoints: Path, keep: int, monitor: str | None, mode: str, report: Callable[[str], None]) -> list[Path]:
    """Remove all but the `keep` newest and the best; returns what was removed.

    Before anything is, the newest is read back from the disk and compared with its hashes: what does not hold good is
    reported and set aside, and counts no more. Checkpoints of a later format are left alone, and not counted.
    """
    if not _surplus(checkpoints, keep, monitor, mode) or not _holds_good(checkpoints, report):
        return []
    surplus = _surplus(checkpoints, keep, monitor, mode)  # fewer, where a damaged one was set aside
    for path in surplus:
        checkpoint.discard(path)
    return surplus


def _surplus(checkpoints: Path, keep: int, monitor: str | None, mode: str) -> list[Path]:
    kept = {found.path for found in checkpoint.readable(checkpoints)[-keep:]}
    if monitor is not None and (top := checkpoint.best(checkpoints, monitor, mode)) is not None:
        kept.add(top.path)
    return [path for path in checkpoint.present(checkpoints) if path not in kept and not _is_newer_format(path)]


def _holds_good(checkpoints: Path, report: Callable[[str], None]) -> bool:
    """Whether there is a whole checkpoint; newer ones that are damaged are set aside on the way to it."""
    for path in reversed(checkpoint.present(checkpoints)):
        try:
            checkpoint.verify(checkpoint.read(path), from_disk=True)
            return True
        except NewerFormat:
            continue
        except DamagedCheckpoint as error:
            report(f"{error}; it is kept as {checkpoint.set_aside(path).name}, and an older one in its place")
    return False


def _is_newer_format(path: Path) -> bool:
    try:
        checkpoint.read(path)
    except NewerFormat:
        return True
    except DamagedCheckpoint:
        return False  # nothing to go on from, and older than one that holds good
    return False

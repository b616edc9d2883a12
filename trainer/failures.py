"""Which rank failed first: the others only see that a connection broke. No torch.

A rank other than 0 leaves `.failed-rank-R` in the run directory before it closes its connections; rank 0, which
writes the record, looks there before it believes its own error to be the cause.
"""

from __future__ import annotations

from pathlib import Path

from trainer.errors import TrainerError
from trainer.files import write_atomically
from trainer.world import World

_PREFIX = ".failed-rank-"


def clear(folder: Path) -> None:
    """Forget the failures of earlier attempts; before any rank starts to work."""
    for path in folder.glob(f"{_PREFIX}*"):
        path.unlink()


def describe(error: BaseException) -> str:
    """What `run.json` says of an error."""
    return f"{type(error).__name__}: {error}"


def note(folder: Path, world: World, error: BaseException) -> BaseException:
    """Leave word of this rank's error; returns the error to end with, on rank 0 that of the rank that failed first."""
    if not world.is_main:
        write_atomically(folder / f"{_PREFIX}{world.rank}", describe(error).encode())
        return error
    others = sorted(folder.glob(f"{_PREFIX}*"), key=lambda path: path.stat().st_mtime_ns)
    if not others or isinstance(error, TrainerError):  # these are raised on all ranks alike
        return error
    return TrainerError(f"rank {others[0].name.removeprefix(_PREFIX)} failed: {others[0].read_text()}")

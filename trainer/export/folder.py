"""A folder that appears whole, or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serving.bundle import MANIFEST
from trainer.errors import TrainerError, UserError
from trainer.files import reason, remedy, remove, sync

_AT_FDCWD = -100
_NOREPLACE, _EXCHANGE = 1, 2
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def require_free(output: Path, force: bool) -> None:
    """Raises UserError where `output` is there and may not be replaced."""
    if not os.path.lexists(output):
        return
    if not force:
        raise UserError(f"--output: {output} is there already; name another folder, or replace it with --force")
    if output.is_symlink() or not (output / MANIFEST).is_file():
        raise UserError(f"--output: {output} is no bundle, so --force does not replace it; name another folder")


@contextmanager
def published(output: Path, force: bool) -> Iterator[Path]:
    """A new folder beside `output`, which takes its place in one step when the block ends well, and is removed if not.

    Raises UserError where another export was there first, TrainerError where the disk refuses.
    """
    making = output.with_name(f".{output.name}.{secrets.token_hex(6)}")
    try:
        making.mkdir(parents=True)
    except OSError as error:
        raise _unwritten(output, error) from error
    try:
        yield making
        for path in [*making.rglob("*"), making]:
            sync(path)
        _publish(making, output, force)
        sync(output.parent)
    except OSError as error:
        raise _unwritten(output, error) from error
    finally:
        remove(making)


def _unwritten(output: Path, error: OSError) -> TrainerError:
    return TrainerError(f"{output}: could not be written ({reason(error)}); {remedy(error)}, then export again")


def _publish(making: Path, output: Path, force: bool) -> None:
    try:
        _rename(making, output, _NOREPLACE)
    except FileExistsError:
        require_free(output, force)
        _rename(making, output, _EXCHANGE)  # `making` is the old one from here on, and is removed


def _rename(source: Path, target: Path, how: int) -> None:
    """renameat2, which neither replaces an empty folder unasked nor leaves a moment without any."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is not None:
        if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), how) == 0:
            return
        number = ctypes.get_errno()
        if number not in _UNSUPPORTED:
            raise OSError(number, os.strerror(number), str(target))
    if how == _NOREPLACE and os.path.lexists(target):  # a system without it: a moment is left between the two
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    if how == _EXCHANGE:
        aside = target.with_name(f"{source.name}.old")
        os.rename(target, aside)
        os.rename(source, target)
        os.rename(aside, source)
    else:
        os.rename(source, target)

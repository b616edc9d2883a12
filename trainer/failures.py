"""Which rank failed first: the others only see that a connection broke. No torch.

The first rank that knows a cause claims it in `RUN/.failure` before it closes its connections, and it alone prints it.
A rank whose connection broke looks there, and at the other ranks' heartbeats, before it believes its own error.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer import health
from trainer.errors import EXIT_FAILURE, TrainerError
from trainer.world import World

CLAIM = ".failure"
WORD_SECONDS = 10.0
"""How long a rank whose connection broke waits for another's word or for signs of its end."""
ALIKE_SECONDS = 2.0
"""How long the other ranks leave rank 0 to tell an error that all have."""
_POLL_SECONDS = 0.05
_LOST = re.compile(
    r"connection (was )?(closed|reset|refused|timed out|aborted)|broken pipe|socket|pair closure|store|nccl|gloo",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Failure:
    """The cause of a job's end, as the rank that knew it first put it."""

    rank: int
    cause: str
    exit_code: int = EXIT_FAILURE


def clear(folder: Path) -> None:
    """Forget the failure of an earlier attempt; before any rank starts to work."""
    (folder / CLAIM).unlink(missing_ok=True)


def describe(error: BaseException) -> str:
    """What `run.json` says of an error."""
    return f"{type(error).__name__}: {error}"


def first(folder: Path) -> Failure | None:
    """The failure that was claimed in this attempt; None where there is none."""
    try:
        return Failure(**json.loads((folder / CLAIM).read_bytes()))
    except FileNotFoundError:
        return None


def claim(folder: Path, failure: Failure) -> Failure:
    """Claim a failure as the job's; returns the one that was first, which is another rank's where it was faster."""
    unfinished = folder / f"{CLAIM}.{secrets.token_hex(6)}"
    try:
        unfinished.write_text(json.dumps(asdict(failure)))
        os.link(unfinished, folder / CLAIM)  # whole or not at all, and for one rank only
    except FileExistsError:
        return first(folder) or failure
    except OSError:  # the disk is full, or the folder is gone: then nobody is told by a file, but by our own words
        return failure
    finally:
        unfinished.unlink(missing_ok=True)
    return failure


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error tells of another process rather than of this one."""
    if isinstance(error, TrainerError) or not isinstance(error, RuntimeError | ConnectionError):
        return False
    return isinstance(error, ConnectionError) or bool(_LOST.search(str(error)))


def conclude(folder: Path, world: World, error: BaseException) -> tuple[Failure, bool]:
    """The failure of the job to which `error` on this rank belongs, and whether it is for this rank to tell."""
    if is_lost_connection(error):
        found = _word_of_others(folder, world)
        if isinstance(found, Failure):
            return found, False
        cause = found or f"a connection to another rank broke: {describe(error)}"
    elif isinstance(error, TrainerError) and not world.is_main:
        if (told := _wait_for_claim(folder, ALIKE_SECONDS)) is not None:
            return told, False
        cause = f"rank {world.rank}: {describe(error)}"
    else:
        cause = f"rank {world.rank}: {describe(error)}" if world.size > 1 else describe(error)
    mine = Failure(world.rank, cause, getattr(error, "exit_code", EXIT_FAILURE))
    held = claim(folder, mine)
    return held, held == mine


def patience(error: BaseException, world: World) -> float:
    """Seconds that this rank leaves to the others to tell an error first, before there is a run directory."""
    if is_lost_connection(error):
        return WORD_SECONDS
    return ALIKE_SECONDS if isinstance(error, TrainerError) and not world.is_main else 0.0


def gone(folder: Path, ranks: range, own: int) -> health.Sign | None:
    """The first of these ranks whose process on this host ended without a word."""
    signs = (health.read(folder, rank) for rank in ranks if rank != own)
    return next((sign for sign in signs if sign is not None and sign.is_gone), None)


def without_a_word(sign: health.Sign) -> str:
    """What is told of a rank that is gone."""
    return f"{sign.where}: the process ended without a word (killed, out of memory, or os._exit)"


def _word_of_others(folder: Path, world: World) -> Failure | str | None:
    """Another rank's claim, or what is known of one that can't claim any more."""
    deadline = time.monotonic() + WORD_SECONDS
    while time.monotonic() < deadline:
        if (claimed := first(folder)) is not None:
            return claimed
        if (sign := gone(folder, range(world.size), world.rank)) is not None:
            return first(folder) or without_a_word(sign)
        time.sleep(_POLL_SECONDS)
    return _silent(folder, world)


def _silent(folder: Path, world: World) -> str | None:
    """The rank of another host that has given no sign for longest, where that is longer than a living one may."""
    files = {rank: folder / health.FOLDER / f"rank-{rank}" for rank in range(world.size) if rank != world.rank}
    ages = {rank: time.time() - file.stat().st_mtime for rank, file in files.items() if file.exists()}
    oldest = max(ages, key=lambda rank: ages[rank], default=None)
    if oldest is None or ages[oldest] < 2 * health.PULSE_SECONDS or (sign := health.read(folder, oldest)) is None:
        return None
    return f"{sign.where}: no sign of life for {ages[oldest]:.0f} s, and the connection to it broke"


def _wait_for_claim(folder: Path, seconds: float) -> Failure | None:
    deadline = time.monotonic() + seconds
    while (found := first(folder)) is None and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return found

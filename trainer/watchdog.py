"""Watches over a rank from a thread: a step that does not end, another rank that is gone, a process that can't stop.

On a hang every rank writes its stacks, and the collective it waits in, to `RUN/health/rank-<r>.stacks`; the first rank
that notices names the one that is behind, and all end. A rank whose interpreter stands still (a library that holds the
GIL) is ended by another rank of its host, with SIGABRT, upon which faulthandler writes the stacks. No torch.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from trainer import failures, health
from trainer.errors import TrainerError
from trainer.failures import Failure
from trainer.health import Heartbeat, Sign
from trainer.run import FAILED, Run
from trainer.world import World

TICK_SECONDS = 1.0
PEERS_SECONDS = 2.0
OWN_END_SECONDS = 12.0
"""How long the training thread may take to end by itself once another rank has failed."""
STACKS_SECONDS = 8.0
"""How long the others have to write their stacks."""
FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "64"}
"""Environment in which torch remembers its last collectives."""
_ASKED = "stacks-wanted"


class Watchdog:
    """Watches this rank and those of its host within its context."""

    def __init__(
        self,
        folder: Path,
        world: World,
        heartbeat: Heartbeat,
        step_timeout: float | None,
        tell: Callable[[TrainerError], None],
    ) -> None:
        """`tell` prints an error as the command line does."""
        self._folder, self._world, self._heart, self._timeout, self._tell = folder, world, heartbeat, step_timeout, tell
        first_here = world.rank - world.local_rank
        self._neighbours = range(first_here, first_here + world.local_size)
        self._tick = min(TICK_SECONDS, (step_timeout or TICK_SECONDS) / 4)
        self._stopped = threading.Event()
        self._must_end_by: float | None = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._stacks = folder / health.FOLDER / f"rank-{world.rank}.stacks"
        self._has_dumped = False

    def __enter__(self) -> Watchdog:
        self._stacks_file = self._stacks.open("w")
        faulthandler.enable(self._stacks_file)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._thread.join()
        faulthandler.enable(sys.__stderr__) if sys.__stderr__ is not None else faulthandler.disable()
        self._stacks_file.close()
        if self._stacks.exists() and self._stacks.stat().st_size == 0:
            self._stacks.unlink()

    def end_within(self, seconds: float) -> None:
        """The rank is failing: should it not come to its end by then, it is ended."""
        self._must_end_by = time.monotonic() + seconds

    def _watch(self) -> None:
        last = last_peers = last_pulse = time.monotonic()
        excused = 0.0
        while not self._stopped.wait(self._tick):
            now = time.monotonic()
            if now - last > 10 * self._tick + 5:  # this process was stopped (Ctrl-Z, a scheduler): nothing hangs
                excused = now
            last = now
            if now - last_pulse > health.PULSE_SECONDS / 2:
                self._heart.pulse()
                last_pulse = now
            if self._must_end_by is not None and now > self._must_end_by:
                os._exit(1)
            if self._must_end_by is not None:
                continue
            if self._timeout is not None and now - max(self._heart.at, excused) > self._timeout:
                self._hangs()
            if self._world.size > 1 and now - last_peers > min(PEERS_SECONDS, 4 * self._tick):
                self._look_at_peers()
                last_peers = now

    # -- other ranks ----------------------------------------------------------------------------------------------

    def _look_at_peers(self) -> None:
        if (self._folder / health.FOLDER / _ASKED).exists():
            self._dump()
        if failures.first(self._folder) is None:
            sign = failures.gone(self._folder, self._neighbours, self._world.rank)
            if sign is None:
                return
            if self._stopped.wait(OWN_END_SECONDS / 2):  # the training thread sees a broken connection, and tells
                return
            if self._must_end_by is None:
                self._conclude(failures.without_a_word(sign))
        if not self._stopped.wait(OWN_END_SECONDS) and self._must_end_by is None:
            os._exit(1)

    def _conclude(self, cause: str) -> None:
        """Claim the job's failure, write it down and tell it, unless another rank was faster."""
        mine = Failure(self._world.rank, cause)
        if failures.claim(self._folder, mine) == mine:
            self._tell(TrainerError(cause))
            Run(self._folder).end_attempt(FAILED, cause)

    # -- a hang ---------------------------------------------------------------------------------------------------

    def _hangs(self) -> None:
        """Does not return."""
        wanted = self._folder / health.FOLDER / _ASKED
        wanted.touch()
        self._dump()
        others = [rank for rank in range(self._world.size) if rank != self._world.rank]
        deadline = time.monotonic() + STACKS_SECONDS
        while time.monotonic() < deadline and not all(_reported(self._folder, rank) for rank in others):
            time.sleep(self._tick / 4)
        for rank in others:
            if _reported(self._folder, rank) is None:
                self._end_frozen(health.read(self._folder, rank))
        self._conclude(self._verdict())
        time.sleep(2 * self._tick)  # the others read the claim; a launcher ends them all once one has ended
        os._exit(1)

    def _end_frozen(self, sign: Sign | None) -> None:
        """SIGABRT for a rank of this host that does not react: its stacks are written by faulthandler then."""
        if sign is not None and sign.rank in self._neighbours and not sign.is_gone:
            os.kill(sign.pid, signal.SIGABRT)

    def _dump(self) -> None:
        if self._has_dumped:
            return
        self._has_dumped = True
        main = sys._current_frames().get(threading.main_thread().ident or 0)
        report: dict[str, Any] = {
            "rank": self._world.rank,
            "step": self._heart.step + 1,
            "phase": self._heart.phase,
            "seconds": round(time.monotonic() - self._heart.at, 1),
            "at": _innermost(main),
            **_collectives(),
        }
        print(json.dumps(report), file=self._stacks_file)
        for thread in threading.enumerate():
            frame = sys._current_frames().get(thread.ident or 0)
            print(f"\nthread {thread.name}:", file=self._stacks_file)
            traceback.print_stack(frame, file=self._stacks_file)
        self._stacks_file.flush()

    def _verdict(self) -> str:
        """Which rank is behind, and where, in one line."""
        signs = [sign for rank in range(self._world.size) if (sign := health.read(self._folder, rank)) is not None]
        reports = {sign.rank: _reported(self._folder, sign.rank) or {} for sign in signs}
        behind = min(signs, key=lambda sign: (reports[sign.rank].get("collectives", 0), *sign.place))
        at = reports[behind.rank].get("at")
        place = f" at {at}" if at else " (its interpreter stands still)"
        text = f"no progress for {self._timeout:g} s: {behind.where}{place}"
        if self._world.size > 1:
            text += " is behind"
            waits = {reports[rank].get("waits_in") for rank in reports if rank != behind.rank} - {None}
            text += f"; the others wait in {', '.join(sorted(map(str, waits)))}" if waits else ""
        return f"{text}; stacks: {self._folder / health.FOLDER}/rank-*.stacks (limit: train.step_timeout)"


def _reported(folder: Path, rank: int) -> dict[str, Any] | None:
    """The first line of a rank's stacks; None where it has not written it (yet)."""
    try:
        line, newline, _ = (folder / health.FOLDER / f"rank-{rank}.stacks").read_text().partition("\n")
        report = json.loads(line) if newline else None
    except (OSError, ValueError):  # not there yet, or written by faulthandler
        return None
    return report if isinstance(report, dict) else None


def _innermost(frame: FrameType | None) -> str | None:
    """Innermost frame outside of torch and the standard library: what a user can look at."""
    found = frame
    while found is not None and (
        "site-packages" in found.f_code.co_filename or "/lib/python" in found.f_code.co_filename
    ):
        found = found.f_back
    found = found or frame
    return f"{found.f_code.co_filename}:{found.f_lineno} {found.f_code.co_name}" if found is not None else None


def _collectives() -> dict[str, Any]:
    """How many collectives this rank has begun, and the one it waits in, from torch's flight recorder."""
    if "torch" not in sys.modules or not sys.modules["torch"].distributed.is_initialized():
        return {}
    from torch._C import _distributed_c10d

    c10d: Any = _distributed_c10d
    trace = json.loads(c10d._dump_fr_trace_json(includeCollectives=True, onlyActive=False))
    begun = sum(int(group.get("last_enqueued_collective", 0)) for group in trace.get("pg_status", {}).values())
    waiting = [entry for entry in trace.get("entries", []) if not entry.get("retired")]
    report: dict[str, Any] = {"collectives": begun}
    if waiting:
        entry = min(waiting, key=lambda entry: int(entry["time_created_ns"]))
        group = " ".join(entry["process_group"])
        report["waits_in"] = f"{entry['profiling_name']} number {entry['collective_seq_id']} of group {group}"
    return report

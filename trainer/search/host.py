"""The process that trials are forked from: torch is imported and the data are loaded, once for all of them.

`python -m trainer.search.host FD` obeys the messages that come over the socket FD and ends when that is closed. A trial
is a fork: its seeds, default types, threads, caches, modules and accelerator memory are those of a process that has
done nothing yet, and what it leaves behind goes with it. So this process itself must never compute in parallel (a
thread pool does not survive a fork) nor touch an accelerator.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import select
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from trainer import environment
from trainer.errors import UserError
from trainer.local_ranks import LOCALHOST, free_port
from trainer.search.channel import Channel, Message, pair

END_SECONDS = 30.0
"""How long the other ranks of a trial may take to end after the first of them has."""
_PR_SET_CHILD_SUBREAPER = 36  # <sys/prctl.h>


@dataclass
class Running:
    """The trial that runs; each of its ranks leads a session."""

    pids: dict[int, int]
    """Process -> rank."""
    channel: Channel
    """To rank 0."""
    codes: dict[int, int] = field(default_factory=dict)
    """Rank -> exit code (negative: the signal)."""
    ended: Message | None = None
    """What rank 0 said of the end."""
    kill_at: float = float("inf")


class Host:
    """Forks trials, one at a time, and passes messages between a trial and whoever gave the order."""

    def __init__(self, control: Channel) -> None:
        self._control = control
        self._running: Running | None = None
        self._wakeup, wakes = pair()
        wakes.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
        self._wakes = wakes

    def serve(self) -> None:
        """Until the other side of the control channel is gone."""
        try:
            while self._control.is_open:
                self._turn()
        finally:
            self._signal(signal.SIGKILL)

    def _turn(self) -> None:
        running = self._running
        sources: list[Any] = [self._control, self._wakeup]
        wait = None
        if running is not None:
            sources += [running.channel] if running.channel.is_open else []
            wait = max(0.0, running.kill_at - time.monotonic()) if running.kill_at < float("inf") else None
        ready, _, _ = select.select(sources, [], [], wait)
        if running is not None and running.channel in ready:
            self._hear(running)
        if self._wakeup in ready:
            self._wakeup.recv(4096)
            self._reap()
        if running is not None and time.monotonic() >= running.kill_at:
            self._signal(signal.SIGKILL)
        if self._control in ready:
            for message in self._control.arrived():
                self._obey(message)

    # -- what is asked for ----------------------------------------------------------------------------------------

    def _obey(self, message: Message) -> None:
        if "run" in message:
            self._start(message["run"])
        elif "signal" in message:
            self._signal(message["signal"])
        elif self._running is not None:
            with suppress(OSError):  # it may be gone, which its end will say
                self._running.channel.send(message)

    def _start(self, order: Message) -> None:
        assert self._running is None, "one trial at a time"
        ours, theirs = pair()
        size = order["processes"]
        world = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": LOCALHOST, "MASTER_PORT": free_port()}
        pids: dict[int, int] = {}
        parent = os.getpid()
        for rank in range(size):
            env = {k: str(v) for k, v in {**world, "RANK": rank, "LOCAL_RANK": rank}.items()} if size > 1 else {}
            pid = os.fork()
            if pid == 0:
                for end in (ours, self._control, self._wakeup, self._wakes):
                    end.close()
                _become_trial({**order, "rank": rank}, env, Channel(theirs), parent)
            pids[pid] = rank
        theirs.close()
        self._running = Running(pids, Channel(ours))

    def _signal(self, number: int) -> None:
        """To all ranks that live; SIGKILL reaches what belongs to them, too."""
        running = self._running
        if running is None:
            return
        for pid, rank in running.pids.items():
            if rank not in running.codes:
                _kill(pid, number)
        if number == signal.SIGKILL:
            running.kill_at = float("inf")

    # -- what comes from the trial --------------------------------------------------------------------------------

    def _hear(self, running: Running, wait: bool = True) -> None:
        for message in running.channel.arrived(wait):
            if message.get("event") == "ended":
                running.ended = message  # passed on when the processes are gone, too
            else:
                self._control.send(message)

    def _reap(self) -> None:
        """Collect what has ended: ranks, and orphans that they left."""
        while True:
            try:  # looked at, not collected: until then the number of its group can't be another's
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            running = self._running
            rank = running.pids.get(found.si_pid) if running is not None else None
            if rank is not None:
                _kill(found.si_pid, signal.SIGKILL)
            _, status = os.waitpid(found.si_pid, 0)
            if running is None or rank is None:
                continue
            running.codes[rank] = os.waitstatus_to_exitcode(status)
            running.kill_at = min(running.kill_at, time.monotonic() + END_SECONDS)  # no rank can go on alone
            if len(running.codes) == len(running.pids):
                self._finish(running)

    def _finish(self, running: Running) -> None:
        """All ranks are gone: say how it ended, in the trial's own words where it had any."""
        left = _kill_children()
        while running.channel.is_open:
            before = running.ended
            self._hear(running, wait=False)
            if before is running.ended and running.channel.is_open:
                break  # nothing more, and somebody else holds the other end
        running.channel.close()
        self._running = None
        ended = running.ended or {"event": "ended", "status": "died", "exit_code": running.codes[0]}
        self._control.send({**ended, "exit_codes": running.codes, "left_behind": left, "host": condition()})


def condition() -> dict[str, int]:
    """What tells whether this process leaks: resident bytes, open files, threads."""
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if sys.platform == "linux" else 0
    files = len(os.listdir("/dev/fd")) - 1
    threads = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 1
    return {"resident": pages * os.sysconf("SC_PAGE_SIZE"), "files": files, "threads": threads}


def _become_trial(order: Message, env: dict[str, str], channel: Channel, parent: int) -> NoReturn:
    """In the fork: a process as one that was started for this trial alone, then the trial."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    environment.signal_at_parents_end(signal.SIGKILL, parent)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for target in (1, 2):
        os.dup2(log, target)
    os.close(log)
    os.environ.update(env)
    code = 1
    try:
        module, _, name = order["target"].partition(":")
        code = getattr(importlib.import_module(module), name)(order, channel)
    except BaseException:
        traceback.print_exc()
    finally:
        # Without tearing the interpreter down: what was forked is not this process's to destroy, and takes its time.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _kill(pid: int, number: int) -> None:
    """Signal a rank; its whole group with SIGKILL."""
    try:
        os.killpg(pid, number) if number == signal.SIGKILL else os.kill(pid, number)
    except ProcessLookupError:
        # Between the fork and its setsid it has no group yet.
        if number == signal.SIGKILL:
            _kill_alone(pid)
    except PermissionError:
        if sys.platform != "darwin":  # which says so of a group of zombies
            raise


def _kill_alone(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _kill_children() -> int:
    """Kill what the trial left behind in sessions of its own (they are ours now); returns how many there were."""
    count = 0
    if sys.platform != "linux":
        return count
    while children := Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        for pid in map(int, children):
            _kill_alone(pid)
            os.waitpid(pid, 0)
            count += 1
    return count


def prepare() -> None:
    """Make this process one that trials can be forked from."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # Ray's processes block SIGINT, and trials would inherit that


def warm_up(setup: Message) -> Message | None:
    """Call what `setup["warm"]` names, as module:function; what to answer where that fails, None where all is well."""
    try:
        module, _, name = setup["warm"].partition(":")
        getattr(importlib.import_module(module), name)(setup)
        gc.collect()
        gc.freeze()  # or each fork would copy all of this memory, only to look for garbage in it
    except Exception as error:
        traceback.print_exc()
        is_mistake = isinstance(error, UserError)  # of the config: it would be the same for every trial
        return {"event": "broken", "error": str(error) or type(error).__name__, "is_mistake": is_mistake}
    return None


def ready(seconds: float) -> Message:
    """What a host says when it takes trials."""
    return {"event": "ready", "seconds": seconds, "pid": os.getpid(), **condition()}


def main(descriptor: int) -> None:
    """Import, load, say so, serve."""
    prepare()
    control = Channel(socket.socket(fileno=descriptor))
    setup = control.recv()
    if setup is None:
        return
    sys.path[:] = setup["sys_path"]
    started = time.perf_counter()
    broken = warm_up(setup)
    control.send(broken or ready(time.perf_counter() - started))
    if broken is None:
        Host(control).serve()


if __name__ == "__main__":
    main(int(sys.argv[1]))

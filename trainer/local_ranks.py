"""Starts the ranks of one job on this machine, and ends them with everything that belongs to them. No torch."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from trainer.environment import signal_at_parents_end

LOCALHOST = "127.0.0.1"
POLL_SECONDS = 0.02
PORTS = (15000, 32000)
"""Below those that systems give out by themselves (from 32768 on Linux, 49152 elsewhere)."""
_OF_A_LAUNCHER = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"),
)
"""Variables of a world that this process may itself be part of; that of the ranks is another one."""


class LocalRanks:
    """Ranks of one job on this machine, each leading a session of its own.

    As a context manager it kills what still runs at the end of the block.
    """

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path]) -> None:
        self._processes, self._logs = list(processes), list(logs)
        self._codes: list[int | None] = [None] * len(self._processes)

    @property
    def pids(self) -> list[int]:
        """Process ids by rank."""
        return [process.pid for process in self._processes]

    def poll(self) -> list[int | None]:
        """Exit codes by rank, negative for a signal, None for a rank that still runs.

        What a rank that has ended left behind in its process group is killed.
        """
        for rank, process in enumerate(self._processes):
            if self._codes[rank] is None:
                self._codes[rank] = _end_of(process)
        return list(self._codes)

    def wait(self, timeout: float) -> list[int]:
        """Exit codes by rank once all have ended; TimeoutError where that takes more than `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            codes = [code for code in self.poll() if code is not None]
            if len(codes) == len(self._processes):
                return codes
            if time.monotonic() > deadline:
                running = [rank for rank, code in enumerate(self._codes) if code is None]
                raise TimeoutError(f"ranks {running} still run after {timeout:g} s")
            time.sleep(POLL_SECONDS)

    def send(self, number: int) -> None:
        """Send a signal to every rank that lives."""
        for process, code in zip(self._processes, self.poll(), strict=True):
            if code is None:
                process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to every rank's whole process group, and wait for the end."""
        for process, code in zip(self._processes, self._codes, strict=True):
            if code is None:
                _kill_group(process.pid)
        for rank, process in enumerate(self._processes):
            self._codes[rank] = process.wait()

    def output(self, rank: int) -> str:
        """What a rank printed, on stdout and stderr together."""
        return self._logs[rank].read_text(errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def start(
    argv: Sequence[str],
    world_size: int,
    logs: Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> LocalRanks:
    """Start `argv` as `world_size` processes, which meet at a free port of this machine where they are several.

    Each has this process's environment with `env` over it, and its log at `logs/rank-<r>.log`. On Linux a rank ends
    with the thread that started it, whatever ends that. Raises OSError where the program can't be started.
    """
    logs.mkdir(parents=True, exist_ok=True)
    inherited = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCHER}
    files = [logs / f"rank-{rank}.log" for rank in range(world_size)]
    port = free_port()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, file in enumerate(files):
            world = _world(rank, world_size, port) if world_size > 1 else {}
            processes.append(_start(argv, file, cwd, {**world, **inherited, **(env or {})}))
    except BaseException:
        LocalRanks(processes, files).kill()
        raise
    return LocalRanks(processes, files)


def free_port() -> int:
    """A port of this machine that nobody listened on a moment ago, and that the system gives to nobody by itself.

    Those that it gives out (to gloo, among others) may be taken before the ranks meet, who then wait for ever for an
    answer from the wrong listener.
    """
    ports = random.SystemRandom().sample(range(*PORTS), 100)
    for port in ports:
        with socket.socket() as probe, suppress(OSError):
            probe.bind((LOCALHOST, port))
            return port
    raise OSError(f"none of {len(ports)} ports between {PORTS[0]} and {PORTS[1]} is free")


def _world(rank: int, size: int, port: int) -> dict[str, str]:
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    # One thread each where nothing else is said, as torchrun has it: several pools stand in each other's way.
    return {**{name: str(value) for name, value in world.items()}, "MASTER_ADDR": LOCALHOST, "OMP_NUM_THREADS": "1"}


def _start(argv: Sequence[str], log: Path, cwd: Path | None, env: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            cwd=cwd,
            env=env,
            start_new_session=True,
            preexec_fn=partial(signal_at_parents_end, signal.SIGKILL, os.getpid()),
        )


def _end_of(process: subprocess.Popen[bytes]) -> int | None:
    """The exit code of a process that has ended, with its group; None while it runs."""
    if sys.platform == "linux":
        # Looked at, not collected: until then the number of the group can't be another's.
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return None
        _kill_group(process.pid)
        return process.wait()
    return process.poll()


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it ended by itself
    except PermissionError:
        if sys.platform != "darwin":  # which says so of a group of zombies
            raise

"""Hosts of this machine in no time: one process imports and loads while Ray is starting, and forks one for each worker.

`python -m trainer.search.nursery FD SOCKET` reads a worker's setup from FD, answers connections at SOCKET, and ends
with all hosts when FD is closed. Only a local Ray's workers can come here; others start a host of their own.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from trainer import environment
from trainer.search.channel import Channel, Message, pair
from trainer.search.host import Host, prepare, ready, warm_up

GPUS = "CUDA_VISIBLE_DEVICES"
"""Set by Ray for each worker; looked at by torch when a trial first touches an accelerator."""


class Nursery:
    """The process seen from the search's driver."""

    def __init__(self, setup: Message, folder: str, env: Mapping[str, str]) -> None:
        """Start it, with `env` over this process's environment; returns at once.

        Its socket is made in `folder`, whose path must be short: that of a socket has 100 characters.
        """
        self.socket = str(Path(folder, "hosts"))
        ours, theirs = pair()
        log = Path(setup["logs"], "hosts.log")
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "trainer.search.nursery", str(theirs.fileno()), self.socket],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, **env, "PYTHONPATH": os.pathsep.join(setup["sys_path"])},
                start_new_session=True,
                preexec_fn=partial(environment.signal_at_parents_end, signal.SIGKILL, os.getpid()),
            )
        theirs.close()
        self._channel = Channel(ours)
        self._channel.send(setup)

    def close(self) -> None:
        """End it, and every host with it."""
        self._channel.close()
        self._process.wait()


def adopt(path: str) -> Channel | None:
    """A worker's channel to a new host of the nursery at `path`; None where there is none (any more)."""
    end = socket.socket(socket.AF_UNIX)
    channel = Channel(end)
    try:
        end.connect(path)
        channel.send({"environment": {name: os.environ[name] for name in (GPUS,) if name in os.environ}})
    except OSError:
        channel.close()
        return None
    return channel


def serve(listener: socket.socket, control: Channel, broken: Message | None) -> None:
    """Fork a host for each that connects, until the control channel is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a host ended; its worker sees its channel close
    while True:
        sources: list[Any] = [listener, control]
        ready_now, _, _ = select.select(sources, [], [])
        if control in ready_now and not control.arrived() and not control.is_open:
            return
        if listener in ready_now:
            end, _ = listener.accept()
            parent = os.getpid()
            if broken is None and os.fork() == 0:
                listener.close()
                control.close()
                _become_host(Channel(end), parent)
            if broken is not None:
                _refuse(Channel(end), broken)
            end.close()


def _refuse(worker: Channel, broken: Message) -> None:
    """Answer a worker what went wrong; after its own first word, or it would find nobody to say it to."""
    if worker.recv() is not None:
        with suppress(OSError):
            worker.send(broken)


def _become_host(control: Channel, parent: int) -> None:
    try:
        os.setsid()
        environment.signal_at_parents_end(signal.SIGKILL, parent)
        prepare()
        first: dict[str, Any] | None = control.recv()
        if first is not None:
            os.environ.update(first["environment"])
            control.send(ready(0.0))
            Host(control).serve()
    finally:
        os._exit(0)


def main(descriptor: int, path: str) -> None:
    """Listen first: who comes early waits; then import and load."""
    control = Channel(socket.socket(fileno=descriptor))
    setup = control.recv()
    if setup is None:
        return
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(128)
    os.chdir(setup["cwd"])
    sys.path[:] = setup["sys_path"]
    serve(listener, control, warm_up(setup))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

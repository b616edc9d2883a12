"""One place for trials on a node of the cluster: a light Ray actor that owns a host process (`host`). No torch in here.

The actor holds the resources that Ray gave it (so the host sees its accelerators and no others), and passes messages.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from trainer import environment
from trainer.search.channel import Channel, Message, pair
from trainer.search.nursery import adopt

END_SECONDS = 10.0
GROWN_BYTES, GROWN_FILES = 512 << 20, 64
"""A host that has grown by this much since it was ready leaks, and is replaced."""


class Worker:
    """Starts a host, has it run one trial at a time, and replaces it when it dies or leaks."""

    def __init__(self, setup: Message) -> None:
        """`setup`: `cwd`, `sys_path`, `logs` (folder), `search` (folder of the search), `mark` (text of its `.mark`
        file), and what `warm` of the host wants."""
        self._setup = setup
        self._host: subprocess.Popen[bytes] | None = None
        self._control: Channel | None = None
        self._ready: Message = {}
        self._lock = threading.Lock()
        """Held while something is written to the host: `interrupt` comes from another thread."""
        self.hosts = 0
        """How many hosts there have been."""

    def ready(self) -> Message:
        """Start the host and wait until its imports are done; `{"event": "ready" | "broken" | "unseen", ...}`."""
        mark = Path(self._setup["search"], ".mark")
        if not mark.is_file() or mark.read_text() != self._setup["mark"]:
            return {"event": "unseen", "host": environment.host()}
        return {**self._start(), "actor": os.getpid(), "name": environment.host()}

    def run(self, order: Message) -> Message:
        """Start a trial; returns its first event (see `child`)."""
        if self._control is None:
            started = self._start()
            if started["event"] != "ready":
                return {"event": "ended", "status": "died", "error": started.get("error", "its host did not start")}
        return self._exchange({"run": order})

    def answer(self, verdict: Message) -> Message:
        """Tell the trial what its report led to; returns its next event."""
        return self._exchange(verdict)

    def next(self) -> Message:
        """The next event of a trial that waits for no answer."""
        return self._exchange(None)

    def interrupt(self, number: int) -> None:
        """Signal the trial, while another call waits for its event."""
        with self._lock:
            if self._control is not None:
                with suppress(OSError):  # the host may be gone, which the other call says
                    self._control.send({"signal": number})

    def close(self) -> None:
        """End the host with all that belongs to it."""
        self._stop()

    def _exchange(self, message: Message | None) -> Message:
        assert self._control is not None
        try:
            if message is not None:
                with self._lock:
                    self._control.send(message)
            event = self._control.recv()
        except OSError:
            event = None
        if event is None:
            self._stop()
            return {"event": "ended", "status": "died", "error": "its host was killed"}
        if event["event"] == "ended" and self._has_grown(event.get("host", {})):
            self._stop()
            event["replaced"] = True
        return event

    def _has_grown(self, now: dict[str, int]) -> bool:
        before = self._ready
        return bool(now) and (
            now["resident"] > before["resident"] + GROWN_BYTES
            or now["files"] > before["files"] + GROWN_FILES
            or now["threads"] > before["threads"]
        )

    def _start(self) -> Message:
        self._stop()
        self.hosts += 1
        control = adopt(self._setup["nursery"]) if "nursery" in self._setup else None
        log = Path(self._setup["logs"], "hosts.log")
        if control is None:
            log = Path(self._setup["logs"], f"host-{environment.host()}-{os.getpid()}.log")
            control = self._start_own(log)
        self._control = control
        event = control.recv()
        if event is None:
            event = {"event": "broken", "error": f"the host ended while it was starting; see {log}"}
        self._ready = event
        return event

    def _start_own(self, log: Path) -> Channel:
        """Start a host that imports and loads for itself."""
        ours, theirs = pair()
        with log.open("ab") as file:
            self._host = subprocess.Popen(
                [sys.executable, "-m", "trainer.search.host", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                cwd=self._setup["cwd"],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(self._setup["sys_path"])},
                start_new_session=True,
                preexec_fn=partial(environment.signal_at_parents_end, signal.SIGKILL, os.getpid()),
            )
        theirs.close()
        control = Channel(ours)
        control.send(self._setup)
        return control

    def _stop(self) -> None:
        """The host ends by itself, and its trial with it, when its channel is closed."""
        with self._lock:
            if self._control is not None:
                self._control.close()
                self._control = None
        if self._host is not None:
            try:
                self._host.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self._host.kill()
                self._host.wait()
            self._host = None


def remote(cpus: float, gpus: float) -> Any:
    """The actor class for a place of this size; imports Ray."""
    import ray

    typed: Any = ray  # its stubs know no concurrency groups
    interrupt = typed.method(concurrency_group="control")(Worker.interrupt)
    controlled = type("TrialWorker", (Worker,), {"interrupt": interrupt})
    return typed.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, concurrency_groups={"control": 1})(controlled)

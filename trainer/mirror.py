"""The mirror: a process that follows a run directory (or a search's) and sends it on to MLflow.

`python -m trainer.mirror RUN PARENT`.

PARENT is the process id of the training, which starts it (see `Tracker`). It reads two lines from its standard input:
the order, and `{"final": STATUS, ...}` when the run has ended. The end of the input without a final word, or a parent
that is gone, means that the training was killed. It answers in lines of JSON on its standard output: `heard` the final
word, a `problem` (null when it is over), and `ended`, the last. How far it has come stands in `tracking.json`, what
went wrong in `mirror.log` (its standard error).

One thread sends; the main one listens, and ends the process when that is asked for, whatever call to a server is under
way then. After the final word it goes on only while sending makes progress (see `Patience`), so that a server that is
down or silent holds nobody.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainer import environment
from trainer.contact import Contact
from trainer.files import locked
from trainer.mirror_log import MirrorLog, secrets_in
from trainer.mirrored import MirroredRun
from trainer.run import KILLED, RUNNING, Run
from trainer.sending import Mirror, log, one_line
from trainer.tracking import INCOMPLETE, MIRROR_ENVIRONMENT, MIRROR_LOCK, SEARCH
from trainer.unsent import finish_others

POLL_SECONDS = 0.5
FINAL_POLL_SECONDS = 0.02
SEND_SECONDS = 3.0
SYSTEM_SECONDS = 10.0
COUNT_SECONDS = 5.0
"""How often the waiting values are counted while sending fails, so that their number is known when the run ends."""
PREDECESSOR_SECONDS = 120.0
"""How long a mirror may outlive its parent: what the next one of the same run waits for it."""
TOLD_AFTER = 2
"""Failed attempts in a row after which the user is told."""
TOLD_AT_THE_END = ("state", "pending", "last_error", "refused", "refused_names")
KILLED_WORD = {"final": KILLED, "drain_seconds": 60.0, "spare_seconds": 5.0}
"""What stands for the final word of a training that was killed: nobody waits, but no process may stay for long."""


@dataclass(frozen=True)
class Patience:
    """How long the end of a run may wait for sending that makes no progress; seconds."""

    failing: float = 0.25
    """Sending failed before the end, and nothing was answered since."""
    unknown: float = 1.0
    """The server has never answered yet."""
    silent: float = 5.0
    """The call under way; twice the slowest answer so far, if that is longer."""
    spare: float = 0.0
    """Added to each of them."""

    def is_over(self, mirror: Mirror, began: float) -> bool:
        """Whether to end now a run whose final word came at `began`."""
        now = time.monotonic()
        contact = mirror.contact
        if mirror.failures >= TOLD_AFTER and mirror.failed_at > began:
            return now - began >= self.spare
        if mirror.failures and contact.answered_at <= mirror.failed_at <= began:
            # (An answer since then: the attempt under way goes well so far.)
            # A database that is locked is free again soon; its next attempt waits five seconds for that
            return now - began >= (self.failing if contact.is_remote else self.silent) + self.spare
        if not contact.is_remote or contact.busy_since is None:
            return False
        if contact.answered_at == -math.inf:
            return now - max(began, contact.busy_since) >= self.unknown + self.spare
        return now - contact.busy_since >= max(self.silent, 2 * contact.slowest) + self.spare


class Parent:
    """The training process at the other ends of standard input and output."""

    def __init__(self, pid: int) -> None:
        self._buffer = b""
        self._pid = pid
        self._out = os.dup(1)
        os.dup2(2, 1)  # what anything else prints goes to the log
        os.set_blocking(self._out, False)  # data workers that were forked keep it open, and nobody reads it then

    def hear(self, timeout: float) -> dict[str, Any] | None:
        """The next line it says within `timeout` seconds; `KILLED_WORD` when it is gone; None for silence."""
        if b"\n" not in self._buffer and select.select([0], [], [], timeout)[0]:
            said = os.read(0, 65536)
            if not said:
                return KILLED_WORD
            self._buffer += said
        line, newline, rest = self._buffer.partition(b"\n")
        if newline:
            self._buffer = rest
            word = json.loads(line)
            assert isinstance(word, dict)
            return word
        # Data workers that were forked hold the pipe open for a while, or for ever, after their parent is dead
        if os.getppid() != self._pid:
            return KILLED_WORD
        return None

    def tell(self, word: dict[str, Any]) -> None:
        """Say a line to it; it may be gone."""
        with contextlib.suppress(OSError):
            os.write(self._out, f"{json.dumps(word)}\n".encode())


class Source(Protocol):
    """What is followed."""

    path: Path

    def mirror(self, order: dict[str, Any]) -> Mirror:
        """What sends it."""

    def others(self, order: dict[str, Any], contact: Contact) -> Generator[None]:
        """Sends what dead ones beside it have left; each `next` takes a moment."""

    def final_status(self, order: dict[str, Any]) -> str:
        """How it ended, where its process said nothing."""


class RunSource:
    """A run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._run = Run(path)

    def mirror(self, order: dict[str, Any]) -> Mirror:
        return Mirror(MirroredRun(self._run), order)

    def others(self, order: dict[str, Any], contact: Contact) -> Generator[None]:
        return finish_others(self._run, order, contact)

    def final_status(self, order: dict[str, Any]) -> str:
        return final_status(self._run, order)


class Sender(threading.Thread):
    """Does all that may take long."""

    def __init__(self, source: Source, order: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self._source = source
        self._order = order
        self._final: tuple[str, float] | None = None
        self._wake = threading.Event()
        self.mirror: Mirror | None = None
        """None until the mirror of an earlier attempt is gone."""
        self.obstacle: str | None = None
        """Why nothing is sent, where that is no failure of sending."""
        self.is_done = False

    def run(self) -> None:
        """Until all is sent after the final word."""
        try:
            with contextlib.ExitStack() as held:
                self._lock(held)
                self._send()
        except Exception as error:  # a bug of ours: the training process starts another mirror, a few times
            log(traceback.format_exc())
            self.obstacle = one_line(error)

    def finish(self, status: str, deadline: float) -> None:
        """Send the rest, and end the MLflow run with `status`, until `deadline` (of `time.monotonic`)."""
        self._final = (status, deadline)
        if self.mirror is not None:
            self.mirror.end_by(deadline)
        self._wake.set()

    def _lock(self, held: contextlib.ExitStack) -> None:
        self.obstacle = "another mirror of this run is still at work"
        try:
            held.enter_context(locked(self._source.path / MIRROR_LOCK, PREDECESSOR_SECONDS))
        except TimeoutError:
            raise
        except OSError as error:  # a full disk; two mirrors would send some values twice, of which MLflow keeps one
            log(f"{MIRROR_LOCK} can't be held: {error}")
        self.obstacle = None

    def _send(self) -> None:
        mirror = self.mirror = self._source.mirror(self._order)
        others = self._source.others(self._order, mirror.contact)
        while self._final is None:
            is_done = mirror.send(math.inf)
            if is_done and self._final is None:
                next(others, None)
            self._wake.wait(SEND_SECONDS if is_done else mirror.pause)
        others.close()
        status, deadline = self._final
        self.is_done = mirror.drain(status, max(deadline - time.monotonic(), 0))


def follow(source: Source, parent: Parent, order: dict[str, Any]) -> int:
    """Mirror the run until the parent has ended, then send the rest; the exit code."""
    sender = Sender(source, order)
    sender.start()
    machine = samples(order)
    next(machine)
    problem = None
    next_sample, next_count = time.monotonic() + SYSTEM_SECONDS, time.monotonic()
    while (word := parent.hear(POLL_SECONDS)) is None and sender.is_alive():
        now, mirror = time.monotonic(), sender.mirror
        if now >= next_sample and mirror is not None:
            mirror.sample(next(machine))
            next_sample = now + SYSTEM_SECONDS
        if mirror is not None and mirror.failures >= TOLD_AFTER and now >= next_count:
            mirror.count_pending()
            next_count = now + COUNT_SECONDS
        new = mirror.state["last_error"] if mirror is not None and mirror.failures >= TOLD_AFTER else None
        if new != problem:
            parent.tell({"problem": (problem := new)})
    if word is None:  # the sender has crashed, or got no lock
        parent.tell({"problem": sender.obstacle})
        return 1
    parent.tell({"heard": word})
    status = source.final_status(order) if word["final"] == KILLED else word["final"]
    if sender.mirror is not None and status != KILLED:
        sender.mirror.sample(next(machine))
    return _conclude(sender, parent, status, word)


def _conclude(sender: Sender, parent: Parent, status: str, word: dict[str, Any]) -> int:
    """Wait for the sender as long as that makes sense, and tell what became of it."""
    began = time.monotonic()
    deadline = began + word["drain_seconds"]
    patience = Patience(spare=word["spare_seconds"])
    sender.finish(status, deadline)
    while sender.is_alive() and time.monotonic() < deadline + POLL_SECONDS:
        if sender.mirror is not None and patience.is_over(sender.mirror, began):
            break
        sender.join(FINAL_POLL_SECONDS)
    mirror = sender.mirror
    if mirror is None:
        parent.tell({"ended": {"state": INCOMPLETE, "last_error": sender.obstacle or "no time was left"}})
    else:
        if not sender.is_done and mirror.state["state"] != INCOMPLETE:
            mirror.close(False, sender.obstacle or f"no answer within {time.monotonic() - began:.1f} s")
        parent.tell({"ended": {key: mirror.state[key] for key in TOLD_AT_THE_END}})
    if sender.is_alive():  # in a call that may take minutes
        os._exit(1)
    return 0 if sender.is_done else 1


def samples(order: dict[str, Any]) -> Iterator[dict[str, float]]:
    """Samples of the machine, the first of them empty; none where they aren't wanted, or can't be had."""
    if order["system_metrics"]:
        from trainer.system_metrics import SystemMetrics

        try:
            metrics = SystemMetrics(order["pid"])
            yield {}
            while True:
                yield metrics.sample()
        except Exception as error:  # psutil's, a driver's: a container may hide what they read
            log(f"no system metrics: {type(error).__name__}: {one_line(error)}")
    while True:
        yield {}


def final_status(run: Run, order: dict[str, Any]) -> str:
    """How a run ended whose process said nothing; writes `killed` down where that process could not.

    Leaves the record alone where another process has taken the run over already.
    """
    record = run.record
    is_same = (record["pid"], record["process_started"]) == (order["pid"], order["process_started"])
    if not is_same or record["host"] != environment.host():
        return KILLED
    if record["status"] != RUNNING:
        return str(record["status"])
    unrecorded = run.end_attempt(KILLED, f"process {order['pid']} ended without a word")
    if unrecorded is not None:
        log(unrecorded)  # a reader sees by itself that the process is gone
    return KILLED


def main() -> int:
    """Ignores the signals that are meant for the training: its own end is the end of its parent."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(5)  # training goes first; but on a full machine the rest should be sent within `drain_seconds`
    for key, value in MIRROR_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    sys.stderr = sys.stdout = MirrorLog(sys.stderr, secrets_in(os.environ))
    path = Path(sys.argv[1])
    parent = Parent(int(sys.argv[2]))
    order = None
    while order is None:
        order = parent.hear(POLL_SECONDS)
    if "final" in order:
        return 1
    sys.stderr.secrets = secrets_in(os.environ, order["uri"])
    return follow(_source(path, order), parent, order)


def _source(path: Path, order: dict[str, Any]) -> Source:
    if order.get("kind") == SEARCH:
        from trainer.search.mirror import SearchSource

        return SearchSource(path)
    return RunSource(path)


if __name__ == "__main__":
    sys.exit(main())

"""The mirror: a process that follows a run directory and sends it on to MLflow. `python -m trainer.mirror RUN PARENT`.

PARENT is the process id of the training, which starts it (see `Tracker`). It reads two lines from its standard input:
the order, and `{"final": STATUS}` when the run has ended. The end of the input without a final word, or a parent that
is gone, means that the training was killed. How far it has come stands in `tracking.json`, what went wrong in
`mirror.log` (its standard error).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import environment
from trainer.files import locked, write_atomically
from trainer.lineage import without_password
from trainer.run import KILLED, RUNNING, Run, parse_entry
from trainer.tracking import MLFLOW_ENVIRONMENT, STATE_FILE, read_state

if TYPE_CHECKING:
    from trainer.mlflow_sink import MlflowRun, Point

FORMAT_VERSION = 1
POLL_SECONDS = 0.5
SEND_SECONDS = 3.0
SYSTEM_SECONDS = 10.0
FIRST_PAUSE, LONGEST_PAUSE, LONGEST_FINAL_PAUSE = 1.0, 30.0, 3.0
"""Seconds between two attempts after an error; doubled from one to the next."""
SEND_BUDGET = 5.0
"""Seconds of one attempt, after which the parent is listened to again."""
KILLED_DRAIN_SECONDS = 60.0
"""How long the rest of a killed run is tried."""
PREDECESSOR_SECONDS = 120.0
"""How long a mirror may outlive its parent: what the next one of the same run waits for it."""
QUEUE_LIMIT = 20_000
"""Values kept in memory; what is not read yet waits in `metrics.jsonl`."""
CHUNK = 1 << 20
SETTLED_SECONDS = 1.0
"""A file of `artifacts/` is sent when it hasn't changed for this long."""
ROOT_FILES = ("config.yaml", "environment.txt", "git.diff")


class Tail:
    """New whole lines of a file that is appended to, and sometimes replaced by a shorter one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = 0
        self._offset = 0

    def read(self) -> tuple[list[bytes], bool]:
        """At most about `CHUNK` bytes of lines, and whether the file was replaced, so that they are its first again."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return [], False
        with file:
            found = os.fstat(file.fileno())
            replaced = self._inode not in (0, found.st_ino) or found.st_size < self._offset
            if replaced:
                self._offset = 0
            self._inode = found.st_ino
            file.seek(self._offset)
            whole, newline, _ = file.read(CHUNK).rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return whole.split(b"\n") if newline else [], replaced


class Mirror:
    """What is still to be sent of one run, and how far it is sent."""

    def __init__(self, run: Run, order: dict[str, Any]) -> None:
        self._run = run
        self._order = order
        self._tail = Tail(run.path / "metrics.jsonl")
        self._queue: deque[Point] = deque()
        self._system: deque[Point] = deque(maxlen=QUEUE_LIMIT)
        self._target: MlflowRun | None = None
        self._is_connected = False
        self._deadline = float("inf")
        self.pause = 0.0
        """Seconds to wait before the next attempt."""
        old = read_state(run.path)
        goes_on = old.get("uri") == without_password(order["uri"]) and old.get("experiment") == order["experiment"]
        self.state: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "uri": without_password(order["uri"]),
            "experiment": order["experiment"],
            "mlflow_run_id": old.get("mlflow_run_id") if goes_on else None,
            "marks": old.get("marks", {}) if goes_on else {},
            "artifacts": old.get("artifacts", {}) if goes_on else {},
            "system_step": old.get("system_step", 0),
            "refused": old.get("refused", 0) if goes_on else 0,
            "pending": None,
            "last_error": None,
        }
        self._sent_before = dict(self.state["marks"])
        self._saved = ""
        self._save(state="connecting")

    def collect(self) -> bool:
        """Read what was logged since the last time, as far as the queue takes it; False when nothing was new."""
        from trainer.mlflow_sink import Point

        if len(self._queue) >= QUEUE_LIMIT:
            return False
        lines, is_replaced = self._tail.read()
        if is_replaced:
            self._queue.clear()
            self._sent_before = dict(self.state["marks"])
        for entry in map(parse_entry, lines):
            if entry is None:
                continue  # torn by a crash; Run.log begins a new line after it
            step = int(entry.get("step", 0))
            milliseconds = int(1000 * entry.get("time", 0))
            for key, value in entry.items():
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                if is_number and key not in ("step", "time") and step > self._sent_before.get(key, -1):
                    self._queue.append(Point(key, float(value), milliseconds, step))
        return bool(lines)

    def sample(self, values: dict[str, float]) -> None:
        """Take a sample of the machine."""
        from trainer.mlflow_sink import Point

        self.state["system_step"] += 1
        now = int(1000 * time.time())
        self._system.extend(Point(key, value, now, self.state["system_step"]) for key, value in values.items())

    def send(self, deadline: float, final: str | None = None) -> bool:
        """One attempt at everything that is there, until `deadline` (of `time.monotonic`) at most.

        `final` also ends the MLflow run. True when nothing was left. What fails doesn't hinder the rest: metrics
        are sent although pictures can't be stored.
        """
        self._deadline = deadline
        steps: list[Callable[[], None]] = [self._send_points, lambda: self._send_files(final is not None)]
        if final is not None:
            steps.append(lambda: self._end(final))
        failures = [] if self._is_connected else self._attempt(self._connect)
        if self._is_connected:
            failures += [error for step in steps for error in self._attempt(step)]
        is_in_time = not self._is_late()
        self.pause = min(max(2 * self.pause, FIRST_PAUSE), LONGEST_PAUSE) if failures else 0.0
        self._save(state="sending", last_error=failures[0] if failures else None)
        return is_in_time and not failures

    def drain(self, status: str, seconds: float) -> bool:
        """Send the rest and end the MLflow run with `status`, within `seconds`; True when nothing was left."""
        deadline = time.monotonic() + seconds
        while not (is_done := self.send(deadline, status)):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            time.sleep(min(self.pause, LONGEST_FINAL_PAUSE, left))
        if is_done:
            self._save(state="done", pending=0)
        else:
            error = self.state["last_error"] or f"not all was sent within {seconds:.0f} s"
            self._save(state="incomplete", pending=self._count_pending(), last_error=error)
        return is_done

    def _attempt(self, step: Callable[[], None]) -> list[str]:
        try:
            step()
        except Exception as error:  # the client raises its own, requests', SQLAlchemy's and the system's
            log(f"{type(error).__name__}: {error}")
            return [one_line(error)]
        return []

    def _is_late(self) -> bool:
        return time.monotonic() > self._deadline

    def _connect(self) -> None:
        from trainer.mlflow_sink import MlflowRun

        if self._target is None:
            self._target = MlflowRun(self._order["uri"], self._order["experiment"], self._run)
        known = self.state["mlflow_run_id"]
        if not self._target.connect(known) and known is not None:
            log(f"MLflow run {known} is gone; {self._target.id} takes all from the beginning")
            self.state.update(marks={}, artifacts={})
            self._sent_before = {}
            self._queue.clear()
            self._tail = Tail(self._run.path / "metrics.jsonl")
        self.state["mlflow_run_id"] = self._target.id
        self._save()
        if self._run.record.get("mlflow_run_id") != self._target.id:
            self._run.update(mlflow_run_id=self._target.id)
        changed = self._target.describe(self._order["tags"])
        if changed:
            log(f"MLflow keeps the first values of these parameters: {', '.join(changed)}")
        self._is_connected = True

    def _send_points(self) -> None:
        while self.collect() and not self._is_late():
            self._send_queue(self._queue)
        self._send_queue(self._queue)
        self._send_queue(self._system)

    def _send_queue(self, queue: deque[Point]) -> None:
        from trainer.mlflow_sink import METRICS_PER_CALL

        assert self._target is not None
        while queue and not self._is_late():
            batch = [queue[index] for index in range(min(len(queue), METRICS_PER_CALL))]
            refused = self._target.log(batch)
            if refused:
                self.state["refused"] += len(refused)
                log(f"MLflow refuses metrics of these names: {', '.join(sorted({point.key for point in refused}))}")
            for point in batch:
                queue.popleft()
                if queue is self._queue:
                    self.state["marks"][point.key] = max(point.step, self.state["marks"].get(point.key, -1))
            self._save()

    def _send_files(self, is_final: bool) -> None:
        assert self._target is not None
        for file, name in self._files():
            if self._is_late():
                return
            found = file.stat()
            version = [found.st_mtime_ns, found.st_size]
            is_settled = is_final or time.time() - found.st_mtime > SETTLED_SECONDS
            if is_settled and self.state["artifacts"].get(name) != version:
                folder = str(Path(name).parent)
                self._target.log_file(file, "" if folder == "." else folder)
                self.state["artifacts"][name] = version
                self._save()

    def _files(self) -> Iterator[tuple[Path, str]]:
        for name in ROOT_FILES:
            if (self._run.path / name).is_file():
                yield self._run.path / name, name
        pictures = self._run.path / "artifacts"
        for file in sorted(pictures.rglob("*")):
            if file.is_file() and not file.name.startswith("."):
                yield file, file.relative_to(pictures).as_posix()

    def _end(self, status: str) -> None:
        assert self._target is not None
        if not self._is_late():
            self._target.log_file(self._run.path / "run.json", "")
            self._target.end(status)

    def _count_pending(self) -> int:
        count = 0
        while True:
            is_new = self.collect()
            count += len(self._queue)
            self._queue.clear()
            if not is_new:
                return count

    def _save(self, **fields: Any) -> None:
        self.state.update(fields)
        content = json.dumps(self.state, indent=1)
        if content != self._saved:
            write_atomically(self._run.path / STATE_FILE, content.encode())
            self._saved = content


class Parent:
    """The training process at the other end of standard input."""

    def __init__(self, pid: int) -> None:
        self._buffer = b""
        self._pid = pid

    def watch(self) -> None:
        """End this process some time after the parent's end, whatever it is doing then: for a thread."""
        while os.getppid() == self._pid:
            time.sleep(POLL_SECONDS)
        time.sleep(PREDECESSOR_SECONDS)
        log("gave up: a call did not come back")
        os._exit(1)

    def hear(self, timeout: float) -> dict[str, Any] | None:
        """The next line it says within `timeout` seconds; `{"final": "killed"}` when it is gone; None for silence."""
        if b"\n" not in self._buffer and select.select([0], [], [], timeout)[0]:
            said = os.read(0, 65536)
            if not said:
                return {"final": KILLED, "drain_seconds": KILLED_DRAIN_SECONDS}
            self._buffer += said
        line, newline, rest = self._buffer.partition(b"\n")
        if newline:
            self._buffer = rest
            word = json.loads(line)
            assert isinstance(word, dict)
            return word
        # Data workers that were forked hold the pipe open for a while, or for ever, after their parent is dead
        if os.getppid() != self._pid:
            return {"final": KILLED, "drain_seconds": KILLED_DRAIN_SECONDS}
        return None


def follow(run: Run, parent: Parent, order: dict[str, Any]) -> int:
    """Mirror the run until the parent has ended, then send the rest."""
    mirror = Mirror(run, order)
    system = None
    if order["system_metrics"]:
        from trainer.system_metrics import SystemMetrics

        system = SystemMetrics(order["pid"])
    next_send = time.monotonic()
    next_sample = next_send + SYSTEM_SECONDS
    while (word := parent.hear(POLL_SECONDS)) is None:
        now = time.monotonic()
        if system is not None and now >= next_sample:
            mirror.sample(system.sample())
            next_sample = now + SYSTEM_SECONDS
        if now >= next_send:
            is_done = mirror.send(now + SEND_BUDGET)
            next_send = time.monotonic() + (SEND_SECONDS if is_done else mirror.pause)
    status = final_status(run, order) if word["final"] == KILLED else word["final"]
    if system is not None and status != KILLED:
        mirror.sample(system.sample())
    return 0 if mirror.drain(status, word["drain_seconds"]) else 1


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
    run.end_attempt(KILLED, f"process {order['pid']} ended without a word")
    return KILLED


def log(text: str) -> None:
    """A line for `mirror.log`."""
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {without_password(text)}", file=sys.stderr, flush=True)


def one_line(error: Exception) -> str:
    """What an error says, fit for `tracking.json` and the terminal."""
    text = " ".join(str(error).split()) or type(error).__name__
    return without_password(text if len(text) <= 300 else f"{text[:300]} ...")


def main() -> int:
    """Ignores the signals that are meant for the training: its own end is the end of its parent."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(5)  # training goes first; but on a full machine the rest should be sent within `drain_seconds`
    for key, value in MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    run = Run(Path(sys.argv[1]))
    parent = Parent(int(sys.argv[2]))
    threading.Thread(target=parent.watch, daemon=True).start()
    order = None
    with contextlib.suppress(TimeoutError):
        while order is None:
            order = parent.hear(POLL_SECONDS)
        if "final" in order:
            return 1
        with locked(run.path / ".mirror.lock", PREDECESSOR_SECONDS):
            return follow(run, parent, order)
    log("another mirror of this run is still at work")
    return 1


if __name__ == "__main__":
    sys.exit(main())

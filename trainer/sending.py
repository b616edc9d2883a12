"""Sends one run on to MLflow: what is still to be sent, how far it has come (`tracking.json`), what went wrong.

Whatever fails, the server, the database or the disk under `tracking.json`, is tried again: nothing here ends the
process, and nothing is forgotten before it was acknowledged.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.contact import Contact
from trainer.files import write_atomically
from trainer.lineage import without_password
from trainer.mirror_log import redacted, secrets_in
from trainer.mirrored import Mirrored
from trainer.spool import QUEUE_LIMIT, Point, Spool
from trainer.tracking import DONE, INCOMPLETE, STATE_FILE, read_state

if TYPE_CHECKING:
    from trainer.mlflow_sink import MlflowRun

FORMAT_VERSION = 1
FIRST_PAUSE, LONGEST_PAUSE, LONGEST_FINAL_PAUSE = 1.0, 30.0, 3.0
"""Seconds between two attempts after an error; doubled from one to the next."""
SETTLED_SECONDS = 1.0
"""A file of `artifacts/` is sent when it hasn't changed for this long."""
FILE_FAILURES = 3
"""So many files that can't be stored in one attempt: then the others will not be, either."""
TOLD = "told"
"""Name of the values that stand in no file of metrics, among the marks."""
TOLD_AT_MOST = 10
"""Different errors in the log of one outage: some name an address in memory, another one each time."""
ERROR_LIMIT, LOG_LIMIT = 300, 2000
"""Characters of an error that are kept: a proxy may answer with a whole page."""


class Mirror:
    """What is still to be sent of one run (or search, or trial), and how far it is sent."""

    def __init__(self, mirrored: Mirrored, order: dict[str, Any], contact: Contact | None = None) -> None:
        """`order` is what `Tracker` tells the mirror's process; runs at one address may share their `contact`."""
        self._mirrored = mirrored
        self._order = order
        self.contact = contact or Contact(order["uri"])
        self._system: deque[Point] = deque(maxlen=QUEUE_LIMIT)
        self._target: MlflowRun | None = None
        self._is_connected = self._is_noted = False
        self._described: object = None
        self._deadline = math.inf
        self._secrets = secrets_in(os.environ, order["uri"])
        self._told: dict[str, set[str]] = {}
        self._lock = threading.Lock()
        self.pause = 0.0
        """Seconds to wait before the next attempt."""
        self.failures = 0
        """Attempts in a row that failed."""
        self.failed_at = -math.inf
        """When the last attempt that failed ended, by `time.monotonic`."""
        old = read_state(mirrored.path)
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
            "refused_names": old.get("refused_names", []) if goes_on else [],
            "pending": None,
            "last_error": None,
            "status": old.get("status") if goes_on else None,
        }
        self._spools: dict[str, Spool] = {}
        self._saved, self._is_saved = "", False
        self._save(state="connecting")

    def sample(self, values: dict[str, float]) -> None:
        """Take a sample of the machine; also from another thread."""
        if not values:
            return
        self.state["system_step"] += 1
        now = int(1000 * time.time())
        self._system.extend(Point(key, value, now, self.state["system_step"]) for key, value in values.items())

    def send(self, deadline: float, final: str | None = None) -> bool:
        """One attempt at everything that is there, until `deadline` (of `time.monotonic`) at most.

        `final` also ends the MLflow run. True when nothing was left. What fails doesn't hinder the rest, metrics are
        sent although pictures can't be stored, unless the server is silent: then each would cost a timeout.
        """
        self.end_by(deadline)
        self.contact.is_silent = False
        failures: list[str] = []
        for step in self._steps(final):
            failures += self._attempt(step)
            if self.contact.is_silent or not self._is_connected:
                break
        is_in_time = not self._is_late()
        self.pause = min(max(2 * self.pause, FIRST_PAUSE), LONGEST_PAUSE) if failures else 0.0
        if self.failures and not failures:
            log(f"goes on after {self.failures} failed attempts")
            self._told.pop("attempt", None)
        self.failures = self.failures + 1 if failures else 0
        self.failed_at = time.monotonic() if failures else self.failed_at
        self._save(state="sending", last_error=failures[0] if failures else None)
        return is_in_time and not failures

    def _steps(self, final: str | None) -> list[Callable[[], None]]:
        steps: list[Callable[[], None]] = [self._connect, self._describe, self._send_points]
        if final is not None:
            steps.append(lambda: self._end(final))
        return [*steps, lambda: self._send_files(final is not None)]

    def drain(self, status: str, seconds: float) -> bool:
        """Send the rest and end the MLflow run with `status`, within `seconds`; True when nothing was left."""
        deadline = time.monotonic() + seconds
        self.pause = 0.0
        while not (is_done := self.send(deadline, status)):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            time.sleep(min(self.pause, LONGEST_FINAL_PAUSE, left))
        self.close(is_done, f"not all was sent within {seconds:.0f} s")
        return is_done

    def close(self, is_done: bool, reason: str) -> None:
        """Write down how it ended; `reason` where no error says why something is left."""
        if is_done:
            self._save(state=DONE, pending=0)
        else:
            error = self.state["last_error"] or reason
            self._save(state=INCOMPLETE, pending=self.count_pending(), last_error=error)

    def end_by(self, deadline: float) -> None:
        """Let no call begin after `deadline`, and none wait for much longer; also from another thread."""
        self._deadline = self.contact.deadline = deadline

    def count_pending(self) -> int:
        """How many values of the run's metrics wait; also from another thread."""
        with self._lock:
            self._open_logs()
            spools = list(self._spools.values())
        return sum(spool.count() for spool in spools) + len(self._untold())

    def _attempt(self, step: Callable[[], None]) -> list[str]:
        try:
            step()
        except Exception as error:  # the client raises its own, requests', SQLAlchemy's and the system's
            text = redacted(str(error), self._secrets)
            self._tell("attempt", f"{type(error).__name__}: {text[:LOG_LIMIT]}")
            if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
                self._is_connected = False  # the run is gone, with its database perhaps: found or made again
            return [one_line(error, self._secrets)]
        return []

    def _tell(self, topic: str, text: str) -> None:
        """Log it, but not again and again."""
        told = self._told.setdefault(topic, set())
        if text not in told and len(told) < TOLD_AT_MOST:
            told.add(text)
            log(text)

    def _is_late(self) -> bool:
        return time.monotonic() > self._deadline

    def _connect(self) -> None:
        if self._is_connected:
            return
        if self._target is None:
            self.contact.knock()
            from trainer.mlflow_sink import MlflowRun

            self._target = MlflowRun(self._order["uri"], self._order["experiment"], self._mirrored, self.contact)
        known = self.state["mlflow_run_id"]
        if not self._target.connect(known, is_over=self._order.get("is_over", False)) and known is not None:
            log(f"MLflow run {known} is gone; {self._target.id} takes all from the beginning")
            with self._lock:
                self.state.update(marks={}, artifacts={})
                self._spools = {}
        is_over = self._order.get("is_over", False)
        self._save(mlflow_run_id=self._target.id, status=self.state["status"] if is_over else None)
        self._is_connected, self._described, self._is_noted = True, None, False

    def _describe(self) -> None:
        assert self._target is not None
        if not self._is_noted:
            self._note_id()
        version = self._mirrored.version()
        if self._described == version:
            return
        tags = {key: redacted(value, self._secrets) for key, value in self._mirrored.tags().items()}
        changed = self._target.describe(self._mirrored.config(), {**tags, **self._order["tags"]})
        if changed:
            self._tell("params", f"MLflow keeps the first values of these parameters: {', '.join(changed)}")
        self._described = version

    def _note_id(self) -> None:
        assert self._target is not None
        if not self._is_saved:
            return  # a full disk: what room `run.json` has kept for itself is for the run's own end
        try:
            self._mirrored.note_id(self._target.id)
            self._is_noted = True
        except OSError as error:  # the disk has filled up since; no reason to send nothing
            self._tell("record", f"run.json can't be written: {error}")

    def _send_points(self) -> None:
        with self._lock:
            self._open_logs()
            spools = list(self._spools.items())
        for name, spool in spools:
            while spool.collect() and not self._is_late():
                self._send_queue(spool.queue, self._marks(name))
            self._send_queue(spool.queue, self._marks(name))
        self._send_queue(deque(self._untold()), self._marks(TOLD))
        self._send_queue(self._system, None)

    def _open_logs(self) -> None:
        for name, (path, prefix) in self._mirrored.logs().items():
            if name not in self._spools:
                self._spools[name] = Spool(path, self._marks(name), prefix)

    def _untold(self) -> list[Point]:
        points = self._mirrored.points()
        marks = self._marks(TOLD) if points else {}
        return [point for point in points if point.step > marks.get(point.key, -1)]

    def _marks(self, name: str) -> dict[str, int]:
        """The last step sent of each metric of one file."""
        marks: dict[str, Any] = self.state["marks"]
        return marks.setdefault(name, {}) if name else marks

    def _send_queue(self, queue: deque[Point], marks: dict[str, int] | None) -> None:
        from trainer.mlflow_sink import METRICS_PER_CALL

        assert self._target is not None
        while queue and not self._is_late():
            batch = [queue[index] for index in range(min(len(queue), METRICS_PER_CALL))]
            self._note_refused(self._target.log(batch))
            with self._lock:
                for point in batch:
                    queue.popleft()
                    if marks is not None:
                        marks[point.key] = max(point.step, marks.get(point.key, -1))
            self._save()

    def _note_refused(self, points: list[Point]) -> None:
        names = {point.key for point in points} - set(self.state["refused_names"])
        if names:
            log(f"MLflow refuses metrics of these names: {', '.join(sorted(names))}")
        with self._lock:
            self.state["refused"] += len(points)
            self.state["refused_names"] = sorted({*self.state["refused_names"], *names})

    def _send_files(self, is_final: bool) -> None:
        failures: list[Exception] = []
        for file, name in self._mirrored.files(is_final):
            if self._is_late():
                break
            try:
                self._send_file(file, name, is_final)
            except Exception as error:  # as in `_attempt`; told when the others had their turn
                failures.append(error)
                if self.contact.is_silent or len(failures) == FILE_FAILURES:
                    break
        if failures:
            raise failures[0]

    def _send_file(self, file: Path, name: str, is_final: bool) -> None:
        assert self._target is not None
        found = file.stat()
        version = [found.st_mtime_ns, found.st_size]
        is_settled = is_final or time.time() - found.st_mtime > SETTLED_SECONDS
        if is_settled and self.state["artifacts"].get(name) != version:
            folder = str(Path(name).parent)
            self._target.log_file(file, "" if folder == "." else folder)
            with self._lock:
                self.state["artifacts"][name] = version
            self._save()

    def _end(self, status: str) -> None:
        assert self._target is not None
        if not self._is_late():
            self._target.end(status, self._mirrored.ended_at() if self._order.get("is_over") else None)
            self._save(status=status)

    def _save(self, **fields: Any) -> None:
        with self._lock:
            self.state.update(fields)
            content = json.dumps(self.state, indent=1)
            if content == self._saved:
                return
            try:
                write_atomically(self._mirrored.path / STATE_FILE, content.encode())
            except OSError as error:  # a full disk: kept in memory until there is room
                self._is_saved = False
                self._tell("disk", f"{STATE_FILE} can't be written: {error}")
            else:
                self._saved = content
                self._is_saved = True
                self._told.pop("disk", None)


def log(text: str) -> None:
    """A line for `mirror.log`."""
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {without_password(text)}", file=sys.stderr, flush=True)


def one_line(error: Exception, secrets: Sequence[str] = ()) -> str:
    """What an error says, fit for `tracking.json` and the terminal."""
    text = redacted(" ".join(str(error).split()), secrets) or type(error).__name__
    return text if len(text) <= ERROR_LIMIT else f"{text[:ERROR_LIMIT]} ..."

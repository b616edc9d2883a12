"""One process that sends requests when they are due: Locust's client, on a schedule of our own.

    python -m serving.loadtest.generator < pipe

For each measurement it reads its task (a line of JSON) from stdin, says `ready` on stdout, reads the moment of the
start, leaves a file of records and one of facts, and says `done`. SIGTERM ends a measurement early, with what there
is; the end of stdin ends the process. It is a process of its
own since Locust patches the standard library of the process that imports it.
"""

from __future__ import annotations

import base64
import gc
import json
import resource
import signal
import ssl
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gevent
import geventhttpclient.client
from gevent import socket as gevent_socket
from gevent.pool import Group
from geventhttpclient.client import HTTPClientPool
from geventhttpclient.response import HTTPConnectionClosed, HTTPParseError
from locust import FastHttpUser
from locust.contrib.fasthttp import LocustBadStatusCode
from locust.env import Environment

from serving.loadtest import records, schedule
from serving.loadtest.alarm import Alarm
from serving.loadtest.answers import difference

BURST = 50
"""Requests that are begun in a row where many are due, before answers are looked at."""
GRACE = 1.0
"""Seconds beyond the time-out of a request after which it is given up from outside."""


@dataclass(frozen=True)
class Task:
    """What one process has to do; plain data, for it comes through a pipe."""

    origin: str
    method: str
    path: str
    headers: dict[str, str]
    payloads: list[dict[str, Any]]
    """`body` (base64 or None), `content_type`, `expected`."""
    tolerance: float
    phases: list[dict[str, float]]
    arrivals: str
    seed: int
    part: int
    parts: int
    warm_up: float
    timeout: float
    connections: int
    records: str
    facts: str


@dataclass
class Facts:
    """What the process knows about itself."""

    planned: int = 0
    begun: int = 0
    cpu: float = 0.0
    """Share of a core."""
    most_in_flight: int = 0
    interrupted: bool = False
    examples: dict[str, str] | None = None
    """How a request ended -> what the first of them said."""


class Generator:
    """Sends, and records what Locust's request event tells."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._payloads = [_payload(task, content) for content in task.payloads]
        self._recorder = records.Recorder()
        self._examples: dict[str, str] = {}
        self._in_flight: dict[int, tuple[float, float]] = {}
        """Number -> when it was due (on the monotonic clock), and the lag."""
        environment = Environment(host=task.origin)
        environment.events.request.add_listener(self._on_request)
        self._pool = HTTPClientPool(
            concurrency=task.connections,
            network_timeout=task.timeout,
            connection_timeout=task.timeout,
            ssl_context_factory=ssl.create_default_context,
        )
        user = type("Client", (FastHttpUser,), {
            "host": task.origin,
            "network_timeout": task.timeout,
            "connection_timeout": task.timeout,
            "insecure": False,
            "client_pool": self._pool,
        })  # fmt: skip
        self._client = user(environment).client
        # A redirect is an answer that the caller should know about.
        self._client.client.redirect_response_codes = frozenset()
        self._group = Group()
        self._start = 0.0
        self.facts = Facts()

    def prepare(self) -> None:
        task = self._task
        phases = [schedule.Phase(**phase) for phase in task.phases]
        self._due = schedule.arrivals(phases, task.arrivals, task.seed, task.part, task.parts)
        self.facts.planned = len(self._due)
        gc.collect()
        gc.freeze()

    def run(self, start: float) -> None:
        """Send from the moment `start` of the monotonic clock, and wait for the last answer."""
        self._start = start + self._task.warm_up
        cpu = time.process_time()
        sending = gevent.spawn(self._send, start)
        on_signal = gevent.signal_handler(signal.SIGTERM, self._stop, sending)
        watching = gevent.spawn(self._stop_with_stdin, sending)
        sending.join()
        self._group.join(timeout=0.0 if self.facts.interrupted else self._task.timeout + GRACE)
        self.facts.cpu = (time.process_time() - cpu) / max(time.monotonic() - start, 1e-9)
        self._give_up()
        watching.kill()
        on_signal.cancel()
        self._pool.close()
        self.facts.examples = self._examples

    def save(self) -> None:
        self._recorder.save(Path(self._task.records))
        Path(self._task.facts).write_text(json.dumps(asdict(self.facts)))

    def _send(self, start: float) -> None:
        alarm = Alarm()
        for number, offset in enumerate(self._due):
            due = start + float(offset)
            while (now := time.monotonic()) < due:
                alarm.wait_until(due)
            if now - due > self._task.timeout:
                return  # hopelessly late: what is left would fail here, and says nothing about the server
            if number % BURST == BURST - 1 and now > due:
                gevent.sleep(0)
            self._group.start(gevent.Greenlet(self._one, due, number))
            self.facts.begun += 1

    def _one(self, due: float, number: int) -> None:
        task = self._task
        lag = time.monotonic() - due
        body, headers, expected = self._payloads[(number * task.parts + task.part) % len(self._payloads)]
        context = {"number": number, "expected": expected}
        self._in_flight[number] = (due, lag)
        self.facts.most_in_flight = max(self.facts.most_in_flight, len(self._in_flight))
        try:
            self._client.request(task.method, task.path, data=body, headers=headers, context=context)
        except Exception as error:  # whatever a client may raise, the request has failed and is counted
            self._record(number, records.OTHER, f"{type(error).__name__}: {error}")

    def _on_request(self, context: dict[str, Any], response: Any, exception: Exception | None, **_: Any) -> None:
        end, text = response.status_code or records.OTHER, ""
        if exception is not None and not (response.status_code and isinstance(exception, LocustBadStatusCode)):
            end, text = _failure(exception), f"{type(exception).__name__}: {exception}"
        elif not 200 <= end < 300:
            text = (response.content or b"")[:300].decode("utf-8", "replace")
        elif context["expected"] is not None:
            wrong = difference(response.content, context["expected"], self._task.tolerance)
            end, text = (records.WRONG, wrong) if wrong else (end, "")
        self._record(context["number"], end, text)

    def _record(self, number: int, end: int, text: str) -> None:
        found = self._in_flight.pop(number, None)
        if found is None:
            return  # given up before
        due, lag = found
        self._recorder.add(due - self._start, lag, time.monotonic() - due, end)
        if text and records.name(end) not in self._examples:
            self._examples[records.name(end)] = " ".join(text.split())[:300]

    def _give_up(self) -> None:
        """Requests that got no answer in time; those of an interrupted test are left out, for nothing is known."""
        if not self.facts.interrupted:
            for number in list(self._in_flight):
                self._record(number, records.TIMEOUT, "no answer in time")
        self._in_flight.clear()
        self._group.kill(block=False)

    def _stop(self, sending: gevent.Greenlet) -> None:
        self.facts.interrupted = True
        sending.kill(block=False)

    def _stop_with_stdin(self, sending: gevent.Greenlet) -> None:
        gevent_socket.wait_read(sys.stdin.fileno())
        self._stop(sending)


def _payload(task: Task, content: dict[str, Any]) -> tuple[bytes | None, dict[str, str], Any]:
    kind = {"Content-Type": content["content_type"]} if content["content_type"] else {}
    body = base64.b64decode(content["body"]) if content["body"] is not None else None
    # A compressed answer would be the generator's work, not the server's.
    return body, {"Accept-Encoding": "identity", **kind, **task.headers}, content["expected"]


def _failure(error: BaseException | None) -> int:
    """The code for what the client raised, or for what is behind it."""
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return records.TLS
        if isinstance(error, TimeoutError | gevent.Timeout):
            return records.TIMEOUT
        if isinstance(error, ConnectionRefusedError):
            return records.REFUSED
        if isinstance(error, HTTPConnectionClosed | ConnectionResetError | BrokenPipeError):
            return records.CLOSED
        if isinstance(error, HTTPParseError):
            return records.PROTOCOL
        # Locust's client wraps what it gave up on.
        error = getattr(error, "original", None) or error.__cause__ or error.__context__
    return records.OTHER


def main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # A GET whose connection breaks would be sent again, in silence, and the failure would be a slow answer.
    geventhttpclient.client._may_retry_after_send_error = lambda method: False
    while line := sys.stdin.readline():
        generator = Generator(Task(**json.loads(line)))
        generator.prepare()
        print("ready", flush=True)
        start = sys.stdin.readline()
        if not start:
            return
        generator.run(float(start))
        generator.save()
        print("done", flush=True)


if __name__ == "__main__":
    main()

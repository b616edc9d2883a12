"""One measurement: the generating processes, from their start to their records."""

from __future__ import annotations

import base64
import importlib.util
import json
import resource
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Self

from serving.errors import Mistake, ServingError
from serving.loadtest import records
from serving.loadtest.records import Records
from serving.loadtest.request import Request
from serving.loadtest.schedule import Phase

READY_SECONDS = 120.0
"""For importing Locust in each process, on a busy machine."""
LEAD_SECONDS = 0.2
"""From telling the processes to the first request."""
SPARE_DESCRIPTORS = 64


@dataclass(frozen=True)
class Load:
    """How requests arrive."""

    rate: float
    """Requests per second, of all processes together."""
    duration: float
    warm_up: float
    """Seconds before it in which the rate goes up from 0; not measured."""
    arrivals: str = "poisson"
    timeout: float = 10.0
    """Seconds for an answer, after which the request counts as failed."""
    seed: int = 0


@dataclass(frozen=True)
class Measured:
    """What the processes have left."""

    load: Load
    records: Records
    """Without the warm-up."""
    seconds: float
    """How long was measured; less than asked for where it was interrupted."""
    planned: int
    begun: int
    """Requests in the whole, with the warm-up."""
    cpu: float
    """Of the busiest process, share of a core."""
    most_in_flight: int
    interrupted: bool
    examples: Mapping[str, str]


class Generators:
    """The generating processes, for one measurement or for several: a context manager.

    Raises Mistake where Locust is missing, ServingError where a generating process fails.
    """

    def __init__(self, request: Request, processes: int) -> None:
        if importlib.util.find_spec("locust") is None:
            raise Mistake("a load test needs Locust: pip install 'yaml-trainer[loadtest]'")
        self._request = request
        self._count = processes
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        self._temporary = tempfile.TemporaryDirectory(prefix="loadtest-")
        self._folder = Path(self._temporary.name)
        try:
            self._processes = [_start(self._folder, part) for part in range(self._count)]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                _close(stream)
        self._temporary.cleanup()

    def measure(self, load: Load) -> Measured:
        """Send the load and wait for the answers. Ctrl-C ends it early: what there is then is returned."""
        for part, process in enumerate(self._processes):
            task = _task(self._request, load, part, self._count, self._folder)
            _say(process, json.dumps(task) + "\n")
        parts = set(range(self._count))
        self._await("ready", READY_SECONDS, set(parts))
        start = time.monotonic() + LEAD_SECONDS
        for process in self._processes:
            _say(process, f"{start}\n")
        try:
            self._await("done", load.warm_up + load.duration + 3 * load.timeout + READY_SECONDS, parts)
        except KeyboardInterrupt:
            for process in self._processes:
                process.terminate()
            self._await("done", READY_SECONDS, parts)
        return self._gather(load, time.monotonic() - start - load.warm_up)

    def _await(self, word: str, seconds: float, waiting: set[int]) -> None:
        """Read `word` from each process in `waiting`, which leaves it then: an interrupt may come in between."""
        deadline = time.monotonic() + seconds
        for part in sorted(waiting):
            process = self._processes[part]
            stream = process.stdout
            assert stream is not None
            found, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
            if not found:
                raise ServingError(f"generating process {part} does not say that it is {word} within {seconds:g} s")
            if stream.readline() != f"{word}\n":
                raise _failed(process, self._folder, part)
            waiting.discard(part)

    def _gather(self, load: Load, elapsed: float) -> Measured:
        parts = range(self._count)
        facts = [json.loads((self._folder / f"{part}.json").read_text()) for part in parts]
        interrupted = any(fact["interrupted"] for fact in facts)
        return Measured(
            load=load,
            records=records.load([self._folder / f"{part}.npz" for part in parts]).after(0.0),
            seconds=min(max(elapsed, 0.0), load.duration) if interrupted else load.duration,
            planned=sum(fact["planned"] for fact in facts),
            begun=sum(fact["begun"] for fact in facts),
            cpu=max(fact["cpu"] for fact in facts),
            most_in_flight=sum(fact["most_in_flight"] for fact in facts),
            interrupted=interrupted,
            examples={key: text for fact in reversed(facts) for key, text in fact["examples"].items()},
        )


def _task(request: Request, load: Load, part: int, parts: int, folder: Path) -> dict[str, Any]:
    phases = [Phase(load.warm_up, 0.0, load.rate)] if load.warm_up else []
    phases.append(Phase(load.duration, load.rate, load.rate))
    _, descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
    return {
        "origin": request.target.origin,
        "method": request.method,
        "path": request.target.path,
        "headers": request.headers,
        "payloads": [
            {
                "body": None if payload.body is None else base64.b64encode(payload.body).decode(),
                "content_type": payload.content_type,
                "expected": payload.expected,
            }
            for payload in request.payloads
        ],
        "tolerance": request.tolerance,
        "phases": [asdict(phase) for phase in phases],
        "arrivals": load.arrivals,
        "seed": load.seed,
        "part": part,
        "parts": parts,
        "warm_up": load.warm_up,
        "timeout": load.timeout,
        "connections": max(descriptors - SPARE_DESCRIPTORS, 1),
        "records": str(folder / f"{part}.npz"),
        "facts": str(folder / f"{part}.json"),
    }


def _start(folder: Path, part: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "serving.loadtest.generator"]
    with (folder / f"{part}.log").open("w") as log:
        # In a session of its own: Ctrl-C is for this process, which asks the others for what they have.
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )


def _say(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(text)
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it has ended, and is asked for its reason where its answer is awaited


def _failed(process: subprocess.Popen[str], folder: Path, part: int) -> ServingError:
    try:
        code = process.wait(timeout=5.0)
    except subprocess.TimeoutExpired:
        code = None
    lines = (folder / f"{part}.log").read_text(errors="replace").strip().splitlines()
    return ServingError(f"generating process {part} has failed (exit code {code}): {lines[-1] if lines else 'no word'}")


def _close(stream: IO[str] | None) -> None:
    try:
        if stream is not None:
            stream.close()
    except BrokenPipeError:
        pass  # what was not read does not matter any more

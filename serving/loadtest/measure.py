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
from typing import IO, Any

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
    processes: int = 1
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


def measure(request: Request, load: Load) -> Measured:
    """Send the load and wait for the answers. Ctrl-C ends it early: what there is then is returned.

    Raises Mistake where Locust is missing, ServingError where a generating process fails.
    """
    if importlib.util.find_spec("locust") is None:
        raise Mistake("a load test needs Locust: pip install 'yaml-trainer[loadtest]'")
    with tempfile.TemporaryDirectory(prefix="loadtest-") as name:
        folder = Path(name)
        processes: list[subprocess.Popen[str]] = []
        try:
            for part in range(load.processes):
                processes.append(_start(folder, _task(request, load, part, folder), part))
            _await_ready(processes, folder)
            start = time.monotonic() + LEAD_SECONDS
            for process in processes:
                _say(process, f"{start}\n")
            _await_end(processes, load)
            seconds = min(max(time.monotonic() - start - load.warm_up, 0.0), load.duration)
            return _gather(processes, folder, load, seconds)
        finally:
            for process in processes:
                process.kill()
                process.wait()
                for stream in (process.stdin, process.stdout):
                    _close(stream)


def _task(request: Request, load: Load, part: int, folder: Path) -> dict[str, Any]:
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
        "parts": load.processes,
        "warm_up": load.warm_up,
        "timeout": load.timeout,
        "connections": max(descriptors - SPARE_DESCRIPTORS, 1),
        "records": str(folder / f"{part}.npz"),
        "facts": str(folder / f"{part}.json"),
    }


def _start(folder: Path, task: Mapping[str, Any], part: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "serving.loadtest.generator"]
    with (folder / f"{part}.log").open("w") as log:
        # In a session of its own: Ctrl-C is for this process, which asks the others for what they have.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    _say(process, json.dumps(task) + "\n")
    return process


def _say(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(text)
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it has ended, and is asked for its reason where its answer is awaited


def _await_ready(processes: list[subprocess.Popen[str]], folder: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    for part, process in enumerate(processes):
        assert process.stdout is not None
        select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        if time.monotonic() >= deadline:
            raise ServingError(f"generating process {part} is not ready after {READY_SECONDS:g} s")
        if process.stdout.readline() != "ready\n":
            raise _failed(process, folder, part)


def _await_end(processes: list[subprocess.Popen[str]], load: Load) -> None:
    """Wait for the processes to end; from Ctrl-C on, for what they have so far."""
    deadline = time.monotonic() + load.warm_up + load.duration + 2 * load.timeout + READY_SECONDS
    try:
        for process in processes:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
    except KeyboardInterrupt:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(timeout=READY_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ServingError("a generating process does not come to its end") from error


def _gather(processes: list[subprocess.Popen[str]], folder: Path, load: Load, seconds: float) -> Measured:
    for part, process in enumerate(processes):
        if process.returncode != 0:
            raise _failed(process, folder, part)
    parts = range(len(processes))
    facts = [json.loads((folder / f"{part}.json").read_text()) for part in parts]
    return Measured(
        load=load,
        records=records.load([folder / f"{part}.npz" for part in parts]).after(0.0),
        seconds=seconds,
        planned=sum(fact["planned"] for fact in facts),
        begun=sum(fact["begun"] for fact in facts),
        cpu=max(fact["cpu"] for fact in facts),
        most_in_flight=sum(fact["most_in_flight"] for fact in facts),
        interrupted=any(fact["interrupted"] for fact in facts),
        examples={key: text for fact in reversed(facts) for key, text in fact["examples"].items()},
    )


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

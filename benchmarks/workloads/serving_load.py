"""A server from its start to its end, and `wrk` on it."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 180.0
STOP_SECONDS = 20.0
SCRIPT = """
function init(arguments)
    local file = io.open(arguments[1], "rb")
    wrk.method = "POST"
    wrk.body = file:read("*a")
    wrk.headers["Content-Type"] = arguments[2]
    file:close()
end
function done(summary, latency, requests)
    local errors = summary.errors
    io.write(string.format(
        '\\nfigures {"requests": %d, "seconds": %f, "p50": %f, "p95": %f, "p99": %f, "connect": %d, "read": %d, '
        .. '"write": %d, "status": %d, "timeout": %d}\\n',
        summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(95) / 1e3,
        latency:percentile(99) / 1e3, errors.connect, errors.read, errors.write, errors.status, errors.timeout))
end
"""


@dataclass(frozen=True)
class Figures:
    """Of one run of wrk."""

    rate: float
    """Answers with a good status per second."""
    p50: float
    p95: float
    p99: float
    """Milliseconds."""
    errors: dict[str, int]
    """Kind -> how many; empty where there was none."""


@contextmanager
def running(
    command: Sequence[str | Path], environment: Mapping[str, str], folder: Path, log: Path, port: int, ready: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A server that answers 200 at `ready`, and its end. Raises RuntimeError, with its output, if it stays down."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _is_up(port, ready):
            if process.poll() is not None or time.monotonic() > deadline:
                text = log.read_text(errors="replace")[-3000:]
                raise RuntimeError(f"{command[:4]} does not come up (exit code {process.poll()}):\n{text}")
            time.sleep(0.05)
        yield process
    finally:
        _end(process)


def ask(port: int, path: str, body: bytes, content_type: str) -> bytes:
    """The answer to one POST. Raises RuntimeError for another status than 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", path, body, {"Content-Type": content_type})
        response = connection.getresponse()
        content = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {content[:500].decode(errors='replace')}")
    return content


def load(
    port: int, path: str, body: Path, content_type: str, connections: int, seconds: float, script: Path
) -> Figures:
    """Closed loop: each connection sends its next request when it has its answer."""
    script.write_text(SCRIPT)
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "30s", "-s", str(script)]
    url = f"http://127.0.0.1:{port}{path}"
    done = subprocess.run(
        [*command, url, "--", str(body), content_type], capture_output=True, text=True, timeout=seconds + 90
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("figures ")]
    if done.returncode or not lines:
        raise RuntimeError(f"wrk failed ({done.returncode}): {done.stdout[-1000:]}{done.stderr[-1000:]}")
    found = json.loads(lines[0].removeprefix("figures "))
    errors = {key: found[key] for key in ("connect", "read", "write", "status", "timeout") if found[key]}
    good = found["requests"] - found["status"]
    if not good:  # a bound for each figure, and an error that says so
        return Figures(1 / seconds, *[seconds * 1e3] * 3, {**errors, "no answer in the whole run": 1})
    return Figures(good / found["seconds"], found["p50"], found["p95"], found["p99"], errors)


def missing() -> str | None:
    """What is not installed and must be."""
    return None if shutil.which("wrk") else "wrk is not installed (Debian: apt-get install wrk)"


def _is_up(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the server, and after a while SIGKILL to all that belongs to it."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # nothing was left

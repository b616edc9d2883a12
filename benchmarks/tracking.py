"""A whole training, process start to process end, with MLflow well, down, and swallowed by a black hole.

    python benchmarks/tracking.py [--quick] [--json FILE]

`python -m trainer fit --config quickstart.yaml` with `train.max_epochs` set, as a user starts it: without tracking, and
mirrored to a SQLite file, to a server, to an address where nobody listens, and to a black hole, which takes
connections and requests and never answers. The black hole must cost nothing: that is the goal. `its end` is the part
from the last word of the run's record to the end of the process, which other work on the machine disturbs least.
Contenders run one after the other, in a new order each round, after a first training that is not counted. What was to
be sent is checked after each training (all of it, or the line that tells how much was not), and that it left no process
behind.

The peers, a hand-written loop with MLflow's client and Lightning's Trainer with its MLFlowLogger, meet the black hole
once, as they come: eight tries of two minutes each, for each call. They are ended after a bound; what they had trained
by then is in the JSON file.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
from harness import Goal, Row, finish, parse_arguments

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "lightning", "mlflow", "scikit-learn")
UNTRACKED, SQLITE, SERVER, DOWN, HOLE = "without tracking", "SQLite", "server", "server down", "black hole"
PATIENCE = 300.0
NOT_SENT = re.compile(r"MLflow: \d+ values were not sent")


@dataclass(frozen=True)
class Training:
    """How one ended."""

    seconds: float
    output: str
    was_ended: bool
    """By the bound."""


def main() -> None:
    arguments = parse_arguments(__doc__)
    epochs, rounds, bound = (3, 1, 4.0) if arguments.quick else (20, 5, 30.0)
    with tempfile.TemporaryDirectory() as name, black_hole() as hole, server(Path(name) / "server") as address:
        folder = Path(name)
        uris = {
            UNTRACKED: None,
            SQLITE: f"sqlite:///{folder / 'mlflow.db'}",
            SERVER: address,
            DOWN: "http://127.0.0.1:9",
            HOLE: hole,
        }
        samples: dict[str, list[float]] = {case: [] for case in uris}
        waits: dict[str, list[float]] = {case: [] for case in uris}
        for case in [UNTRACKED] if arguments.quick else uris:
            train(case, uris[case], folder, 1)
        for _ in range(rounds):
            for case in random.sample(list(uris), len(uris)):
                seconds, wait = train(case, uris[case], folder, epochs)
                samples[case].append(seconds)
                waits[case].append(wait)
        peers = {kind: run_peer(kind, hole, folder, bound) for kind in ("hand", "lightning")}
    finish("Tracking", rows_of(samples, waits, peers, bound), arguments.json, PACKAGES)


def rows_of(
    samples: dict[str, list[float]], waits: dict[str, list[float]], peers: dict[str, Training], bound: float
) -> list[Row]:
    rows = []
    for case in (HOLE, DOWN, SQLITE, SERVER):
        goal = Goal(UNTRACKED, 1.05) if case in (HOLE, DOWN) else None
        rows.append(Row(f"a training, {case}", "s", samples[case], {UNTRACKED: samples[UNTRACKED]}, "lower", goal))
        rows.append(Row(f"its end, {case}", "s", waits[case], {UNTRACKED: waits[UNTRACKED]}, "lower"))
    names = {"hand": "MLflow's client by hand", "lightning": "Lightning's MLFlowLogger"}
    notes = {
        names[kind]: {
            "ended by the bound": found.was_ended,
            "bound in s": bound,
            "steps trained": max([0, *map(int, re.findall(r"step (\d+)", found.output))]),
        }
        for kind, found in peers.items()
    }
    ended = {
        f"{names[kind]}{f', ended after {bound:.0f} s' if found.was_ended else ''}": [found.seconds]
        for kind, found in peers.items()
    }
    ours = sorted(samples[HOLE])[len(samples[HOLE]) // 2 :][:1]
    return [*rows, Row("the same black hole, once", "s", ours, ended, "lower", notes={"peers at the bound": notes})]


def train(case: str, uri: str | None, folder: Path, epochs: int) -> tuple[float, float]:
    """Seconds of one training of ours, and those of them after its record says that it has ended; raises where it left
    anything undone."""
    command = [sys.executable, "-m", "trainer", "fit", "--config", "quickstart.yaml", f"runs_dir={folder / 'runs'}"]
    command += [f"train.max_epochs={epochs}", "tracking.enabled=false" if uri is None else f"tracking.uri={uri}"]
    found = run(command, PATIENCE)
    now = datetime.now(UTC)
    if found.was_ended or bool(NOT_SENT.search(found.output)) != (case in (DOWN, HOLE)):
        raise RuntimeError(f"{case}: {found.output[-2000:]}")
    left = [process for process in psutil.process_iter(["cmdline"]) if str(folder) in str(process.info["cmdline"])]
    if any("trainer.mirror" in str(process.info["cmdline"]) for process in left):
        raise RuntimeError(f"{case}: the mirror outlived the training")
    record = json.loads(max(folder.glob("runs/*/*/run.json")).read_bytes())
    return found.seconds, (now - datetime.fromisoformat(record["attempts"][-1]["ended"])).total_seconds()


def run_peer(kind: str, uri: str, folder: Path, bound: float) -> Training:
    return run([sys.executable, "-m", "workloads.digits_with_mlflow", kind, uri, str(folder)], bound)


def run(command: Sequence[str], bound: float) -> Training:
    """Run it to its end, at most for `bound` seconds."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    # One thread: several that wait for each other take ten times as long when the machine has other work.
    variables |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    paths = [str(ROOT), str(ROOT / "benchmarks"), variables.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    began = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            process.wait(bound)
            was_ended = False
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            was_ended = True
        seconds = time.perf_counter() - began
        output.seek(0)
        return Training(seconds, output.read().decode(), was_ended)


@contextmanager
def server(home: Path) -> Iterator[str]:
    """The address of an MLflow server."""
    home.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{home / 'mlflow.db'}",
        "--artifacts-destination",
        str(home / "files"),
    ]
    variables = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (home / "log").open("wb") as output:
        process = subprocess.Popen(command, cwd=home, env=variables, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + PATIENCE
        while not is_well(address):
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError((home / "log").read_text()[-2000:])
            time.sleep(0.1)
        yield address
    finally:
        tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in tree:
            member.kill()
        process.wait()


def is_well(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextmanager
def black_hole() -> Iterator[str]:
    """The address of a server that takes connections and requests, and never answers."""
    held: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    held.append(listener.accept()[0])
                except OSError:  # closed: the end
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    for connection in held:
        connection.close()


if __name__ == "__main__":
    main()

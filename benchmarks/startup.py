"""From process start to the first line on the terminal and to the first optimizer step, wall and CPU time.

    python benchmarks/startup.py [--quick] [--json FILE]

`python -m trainer fit --config quickstart.yaml` as it ships (MLflow's mirror, a process of its own, is started
before the first step and counted), and with `tracking.enabled=false`; a hand-written script for the same work; and
Lightning's Trainer. The first step is the line `step 1 ...` that each prints when its first optimizer step is done.
CPU time is that of the process and its children up to the moment that line is read. Contenders run one after the
other, in a new order each round, on a warm file cache; a first round is not counted.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from harness import Goal, Row, finish, parse_arguments

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "lightning", "scikit-learn", "mlflow")
GOAL = Goal("hand-written", 1.3)
FIT, UNTRACKED, BY_HAND, LIGHTNING = "fit", "fit, MLflow off", "hand-written", "Lightning's Trainer"
PATIENCE = 120.0


@dataclass(frozen=True)
class Start:
    """Seconds since the process was started."""

    first_line: float
    first_step: float
    cpu: float
    """CPU seconds of the process and its children at the first step."""


def main() -> None:
    arguments = parse_arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        commands = commands_in(folder)
        samples: dict[str, list[Start]] = {name: [] for name in commands}
        for number in range(1 + (1 if arguments.quick else 9)):
            for name in random.sample(list(commands), len(commands)):
                start = measure(commands[name])
                if number > 0:
                    samples[name].append(start)
        mirror = mirror_cpu_seconds(commands[FIT], Path(folder))
    rows = []
    for ours in (FIT, UNTRACKED):
        for field, case in (("first_step", "first step"), ("cpu", "first step, CPU"), ("first_line", "first line")):
            values = {name: [getattr(start, field) for start in starts] for name, starts in samples.items()}
            peers = {name: values[name] for name in (BY_HAND, LIGHTNING)}
            rows.append(Row(f"{ours}: {case}", "s", values[ours], peers, "lower", GOAL))
    rows.append(Row("MLflow's mirror, CPU until it sends", "s", [mirror], {}, "lower"))
    finish("Start-up", rows, arguments.json, PACKAGES)


def commands_in(folder: str) -> dict[str, list[str]]:
    fit = [sys.executable, "-m", "trainer", "fit", "--config", "quickstart.yaml", f"runs_dir={folder}"]
    return {
        FIT: fit,
        UNTRACKED: [*fit, "tracking.enabled=false"],
        BY_HAND: [sys.executable, "-m", "workloads.digits_by_hand"],
        LIGHTNING: [sys.executable, "-m", "workloads.digits_on_lightning", folder],
    }


def measure(command: Sequence[str]) -> Start:
    """Run the command to its first step, then end it."""
    began = time.perf_counter()
    process = launch(command)
    try:
        assert process.stdout is not None
        first_line = None
        told = []
        for line in process.stdout:
            now = time.perf_counter() - began
            first_line = first_line or now
            told.append(line)
            if line.startswith(b"step 1"):
                return Start(first_line, now, cpu_seconds(process.pid))
        raise RuntimeError(f"{' '.join(command)} ended before its first step: {b''.join(told[-20:]).decode()}")
    finally:
        end(process)


def launch(command: Sequence[str]) -> subprocess.Popen[bytes]:
    # What a user has, however this process was started: bytecode of the sources is kept.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    paths = [str(ROOT), str(ROOT / "benchmarks"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and all its children, the mirror too, which would outlive it."""
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in tree:
        member.kill()
    process.communicate()


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and its children, those that have ended included."""
    root = psutil.Process(pid)
    return sum(sum(member.cpu_times()[:4]) for member in [root, *root.children(recursive=True)])


def mirror_cpu_seconds(command: Sequence[str], folder: Path) -> float:
    """What the mirror costs beside the first steps: importing mlflow, making the run, sending the first values."""
    before = set(folder.glob("*/*/tracking.json"))
    process = launch([*command, "train.max_epochs=1000"])
    deadline = time.monotonic() + PATIENCE
    try:
        while time.monotonic() < deadline:
            for file in set(folder.glob("*/*/tracking.json")) - before:
                if json.loads(file.read_bytes())["state"] == "sending":
                    (mirror,) = psutil.Process(process.pid).children()
                    return sum(mirror.cpu_times()[:2])
            time.sleep(0.1)
        raise RuntimeError(f"the mirror sent nothing within {PATIENCE:.0f} s")
    finally:
        end(process)


if __name__ == "__main__":
    main()

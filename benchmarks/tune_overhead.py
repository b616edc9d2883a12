"""What a search costs beside its trainings: `trainer tune` against plain Ray Tune, with the same trials.

    python benchmarks/tune_overhead.py [--quick] [--json FILE]

40 trials of about a second of real training (a small network on digits, one thread each, five evaluations), two at a
time. Contenders, one after the other in a new order each round, each as a command of its own from its start to its end:
`trainer tune`; Ray Tune as it is; Ray Tune with `reuse_actors=True`. All have the same trainable, sampler (TPE), and no
scheduler. Overhead per trial = (wall × workers − training) ÷ trials, training being the time of the trials in their
loops. CPU time is that of all processes, looked at ten times a second. A second case has 1,000 trials that do nothing:
trials per second, and how much the driver's memory grows in the second half of them.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from harness import Goal, Row, argument_parser, finish

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "ray", "optuna")
OURS, DEFAULTS, REUSED = "trainer tune", "Ray Tune", "Ray Tune, actors reused"
WORKERS = 2
BASE = """
extends: quickstart.yaml
name: overhead
model: {name: mlp, widths: [256, 256]}
schedule: {name: constant}
train: {max_epochs: EPOCHS, device: cpu, log_every: 1000}
evaluate: {every_epochs: EVERY, test: false}
checkpoint: {monitor: null}
tracking: {enabled: false}
tune:
  objective: {val/accuracy: max}
  scheduler: none
  space:
    optimizer.lr: {log_uniform: [1.0e-4, 1.0e-1]}
    optimizer.weight_decay: {uniform: [0.0, 0.1]}
"""


@dataclass(frozen=True)
class Taken:
    """What one search took."""

    wall: float
    cpu: float
    training: float
    """Seconds of all trials in their loops."""
    memory: list[float]
    """MB of the driver, ten times a second."""


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--trials", type=int, help="trials of a search (40; 8 with --quick)")
    parser.add_argument("--rounds", type=int, help="rounds (5; 1 with --quick)")
    arguments = parser.parse_args()
    trials = arguments.trials or (8 if arguments.quick else 40)
    rounds = arguments.rounds or (1 if arguments.quick else 5)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base.yaml")
        base.write_text(BASE.replace("EPOCHS", "40").replace("EVERY", "8"))
        rows = trained(base, trials, rounds, Path(folder))
        rows += empty(base, 100 if arguments.quick else 1000, Path(folder))
    finish("Searches", rows, arguments.json, PACKAGES)


def trained(base: Path, trials: int, rounds: int, folder: Path) -> list[Row]:
    taken: dict[str, list[Taken]] = {OURS: [], DEFAULTS: [], REUSED: []}
    for _ in range(rounds):
        for name in random.sample(list(taken), len(taken)):
            taken[name].append(search(name, base, trials, folder))
            last = taken[name][-1]
            print(f"{name}: {last.wall:.1f} s, {last.training:.1f} s of training", file=sys.stderr)

    def row(case: str, unit: str, of: str, better: str, goal: Goal | None = None) -> Row:
        values = {name: [measures(one, trials)[of] for one in searches] for name, searches in taken.items()}
        ours = values.pop(OURS)
        return Row(f"{trials} trials: {case}", unit, ours, values, better, goal)  # type: ignore[arg-type]

    return [
        row("trials an hour", "1/h", "rate", "higher", Goal(DEFAULTS, 2.5)),
        row("trials an hour, against reuse", "1/h", "rate", "higher", Goal(REUSED, 1.2)),
        row("overhead a trial", "s", "overhead", "lower"),
        row("wall", "s", "wall", "lower"),
        row("CPU", "s", "cpu", "lower"),
        row("training a trial", "s", "training", "lower"),
    ]


def measures(taken: Taken, trials: int) -> dict[str, float]:
    return {
        "rate": 3600 * trials / taken.wall,
        "overhead": (taken.wall * WORKERS - taken.training) / trials,
        "wall": taken.wall,
        "cpu": taken.cpu,
        "training": taken.training / trials,
    }


def empty(base: Path, trials: int, folder: Path) -> list[Row]:
    """Trials that do nothing: ours alone, and Ray Tune with reused actors on a tenth of them."""
    ours = search(OURS, base, trials, folder, empty=True)
    few = max(trials // 10, 20)
    peer = search(REUSED, base, few, folder, empty=True)
    # Between the middle and the last look before the report is made, which imports what it needs.
    settled = ours.memory[len(ours.memory) // 2 : -len(ours.memory) // 10]
    growth = settled[-1] - settled[0]
    return [
        Row(f"{trials} empty trials", "1/s", [trials / ours.wall], {REUSED: [few / peer.wall]}, "higher"),
        Row("driver's memory at the end", "MB", [settled[-1]], {}, "lower", notes={"growth_mb": growth}),
        Row("growth from the middle to the end of the trials", "MB", [growth], {}, "lower"),
    ]


def search(name: str, base: Path, trials: int, folder: Path, empty: bool = False) -> Taken:
    """Run a contender's search to its end."""
    out = folder / "out.json"
    out.unlink(missing_ok=True)
    arguments = [str(base), str(trials), str(out), *(["--empty"] if empty else [])]
    if name == OURS:
        command = [sys.executable, "-m", "workloads.tune_ours", *arguments]
    else:
        reuse = ["--reuse-actors"] if name == REUSED else []
        command = [sys.executable, "-m", "workloads.tune_with_ray", *arguments, *reuse]
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "RAY_USAGE_STATS_ENABLED": "0"}
    log = folder / "log.txt"
    with log.open("w") as file:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        cpu, memory = watch(process)
        wall = time.perf_counter() - began
    if process.returncode or not out.exists():
        raise RuntimeError(f"{name} failed: {log.read_text()[-2000:]}")
    return Taken(wall, cpu, json.loads(out.read_text())["training"], memory)


def watch(process: subprocess.Popen[bytes]) -> tuple[float, list[float]]:
    """CPU seconds of the process and all that belong to it, and the process's own memory over time, MB."""
    spent: dict[tuple[int, float], float] = {}
    memory: list[float] = []
    root = psutil.Process(process.pid)
    while process.poll() is None:
        members: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):  # it may end between two looks
            if resident := root.memory_info().rss:  # 0 of one that has just ended
                memory.append(resident / 1e6)
            members = [root, *root.children(recursive=True)]
        for member in members:
            with suppress(psutil.NoSuchProcess):  # the others are counted all the same
                times = member.cpu_times()
                spent[member.pid, member.create_time()] = times.user + times.system
        time.sleep(0.1)
    return sum(spent.values()), memory


if __name__ == "__main__":
    main()

"""Steps per second of `trainer fit` against a hand-written loop, Fabric, Accelerate and Lightning's Trainer.

    python benchmarks/engine_overhead.py [--quick] [--json FILE]

All train the same model on the same random pictures in memory, with fused AdamW, on the CPU with torch's default
number of threads (OMP_NUM_THREADS sets another). Each contender is a process of its own; in each round each takes
one turn, in a new order, while the others stand still (SIGSTOP, their children too), so that only one has the
machine. A turn warms up, then is timed.

`fit` is the whole of it: run directory, `metrics.jsonl`, progress lines (every tenth step), once with the mirror to
MLflow (a process of its own, on a SQLite file, taking its share of the same cores) and once without. ResNet-18 is
torchvision's, with ImageNet's stem, which leaves 8×8 pixels of 32×32: a short step, so the harder case. `--quick`
leaves it out.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path

from harness import Goal, Row, finish, parse_arguments
from workloads.turns import Contender, contenders
from workloads.work import LOG_EVERY, Work, start

RESNET = Work("resnet18", {"name": "torchvision", "arch": "resnet18"}, {"channels": 3, "size": 32}, batch_size=32)
MLP = Work("mlp", {"name": "mlp", "widths": [256, 256]}, {"channels": 1, "size": 28}, batch_size=64)
GOALS = {"resnet18": 0.98, "mlp": 0.90}
PACKAGES = ("torch", "torchvision", "lightning", "accelerate", "mlflow")
OURS = {"MLflow off": "fit", "MLflow on": "fit, MLflow on"}
CONTENDERS = {
    OURS["MLflow off"]: partial(start, "ours", {"tracking": False}),
    OURS["MLflow on"]: partial(start, "ours", {"tracking": True}),
    "hand-written": partial(start, "hand_written", {}),
    "Fabric": partial(start, "on_fabric", {}),
    "Accelerate": partial(start, "on_accelerate", {}),
    "Trainer": partial(start, "on_lightning", {"loader": False, "logs": False}),
    "Trainer, self.log": partial(start, "on_lightning", {"loader": False, "logs": True}),
    "Trainer, DataLoader": partial(start, "on_lightning", {"loader": True, "logs": False}),
}
PRELOADED = ["torchvision.models", "torch._dynamo", "torchmetrics"]
MIRROR_SECONDS = 60.0


def main() -> None:
    arguments = parse_arguments(__doc__)
    works, rounds, seconds = ((MLP,), 3, 0.4) if arguments.quick else ((RESNET, MLP), 9, 2.5)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # no contender may be left, standing still
    # A server that has imported the slow common part once is forked for each contender.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    rows = []
    for work in works:
        with tempfile.TemporaryDirectory() as folder:
            steps, samples = measure(work, Path(folder), context, rounds, seconds)
        peers = {name: values for name, values in samples.items() if name not in OURS.values()}
        notes = {"batch_size": work.batch_size, "steps_per_turn": steps, "threads": num_threads()}
        goal = Goal("hand-written", GOALS[work.name])
        for variant, name in OURS.items():
            rows.append(Row(f"{work.name}, {variant}", "steps/s", samples[name], peers, "higher", goal, notes))
    finish("Engine overhead", rows, arguments.json, PACKAGES)


def measure(
    work: Work, folder: Path, context: ForkServerContext, rounds: int, seconds: float
) -> tuple[int, dict[str, list[float]]]:
    """Steps of a turn, and steps per second of each contender in each round."""
    targets = {name: partial(contender, work, folder) for name, contender in CONTENDERS.items()}
    samples: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    with contenders(context, targets, folder) as started:
        wait_for_mirror(folder)
        for contender in started.values():
            contender.pause()
        steps = steps_within(started["hand-written"], seconds)
        for _ in range(rounds):
            for name, contender in random.sample(list(started.items()), len(started)):
                samples[name].append(steps / contender.turn(warmup=steps // 5, steps=steps))
    return steps, samples


def steps_within(contender: Contender, seconds: float) -> int:
    """Steps of a turn of about `seconds`; each turn has the same number of logged steps."""
    contender.turn(warmup=LOG_EVERY, steps=LOG_EVERY)
    step_seconds = contender.turn(warmup=LOG_EVERY, steps=LOG_EVERY) / LOG_EVERY
    return max(1, round(seconds / step_seconds / LOG_EVERY)) * LOG_EVERY


def wait_for_mirror(folder: Path) -> None:
    """Until the mirror has imported mlflow, made its database and sent the first step: that is paid once a run."""
    deadline = time.monotonic() + MIRROR_SECONDS
    while time.monotonic() < deadline:
        for file in folder.glob("tracked/*/*/tracking.json"):
            if json.loads(file.read_bytes())["state"] == "sending":
                return
        time.sleep(0.1)
    raise RuntimeError(f"the mirror sent nothing within {MIRROR_SECONDS:.0f} s")


def num_threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    main()

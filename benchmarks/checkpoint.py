"""What a checkpoint costs the training: `Saver` against Lightning's ModelCheckpoint and plain torch.save.

    python benchmarks/checkpoint.py [--quick] [--json FILE] [--folder DIR]

500 MB of state, a model and its AdamW, on the CPU. Each contender trains in a process of its own, and they take turns
(the others stand still). A turn is some steps, a save, and steps until the save has reached the disk; this three times,
of which the first is not counted, and the last is two saves without a step between them. Told are how
long the training thread stands still, how much later the training ends by it (the stall, and steps that are slower
while another thread writes), how long it takes until the checkpoint is durable, and how long a save stalls that
comes at once after another.

Ours writes with sha256 of every file and fsync, and reads the new checkpoint back before it removes the one before.
The peers do none of it: they are brought to the disk (fsync) by the benchmark, outside of their stall. All keep one
checkpoint. The checkpoints go to a temporary folder, or below DIR.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

from harness import Goal, Row, argument_parser, finish
from workloads.saves import start
from workloads.turns import contenders

GOAL = Goal("ModelCheckpoint", 0.2)
OURS = "Saver"
CONTENDERS = {
    OURS: ("saves_ours", "saver"),
    "ModelCheckpoint": ("saves_lightning", "sync"),
    "ModelCheckpoint, async": ("saves_lightning", "async"),
    "torch.save": ("saves_ours", "torch.save"),
}
CASES = {
    "stall": ("the training thread stands still", GOAL),
    "lost": ("the training ends later by", None),
    "durable": ("until it is durable", None),
    "second": ("stall of a second save at once", None),
}
PACKAGES = ("torch", "lightning")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--folder", metavar="DIR", type=Path, help="where the checkpoints go (a temporary folder)")
    arguments = parser.parse_args()
    megabytes, rounds = (60, 3) if arguments.quick else (500, 5)
    # Training and writing share the cores: threads that spin while they wait would take them from whoever writes.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # no contender may be left, standing still
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        samples, first = measure(megabytes, Path(folder), rounds)
    rows = []
    for key, (text, goal) in CASES.items():
        peers = {name: samples[name][key] for name in CONTENDERS if name != OURS}
        notes = {"megabytes": megabytes, "first": {name: values[key] for name, values in first.items()}}
        rows.append(Row(text, "s", samples[OURS][key], peers, "lower", goal, notes))
    finish(f"A checkpoint of {megabytes} MB", rows, arguments.json, PACKAGES)


def measure(
    megabytes: int, folder: Path, rounds: int
) -> tuple[dict[str, dict[str, list[float]]], dict[str, dict[str, float]]]:
    """Samples by contender and figure, and the figures of each one's first save, which makes its buffers."""
    context = multiprocessing.get_context("forkserver")
    targets = {name: partial(start, *which, megabytes, folder) for name, which in CONTENDERS.items()}
    samples: dict[str, dict[str, list[float]]] = {name: {key: [] for key in CASES} for name in CONTENDERS}
    with contenders(context, targets, folder) as started:
        for contender in started.values():
            contender.pause()
        first = {name: contender.ask(None)[0] for name, contender in started.items()}
        for _ in range(rounds):
            for name, contender in random.sample(list(started.items()), len(started)):
                _, saves = contender.ask(None)
                for key in CASES:
                    samples[name][key].append(saves[key])
    return samples, first


if __name__ == "__main__":
    main()

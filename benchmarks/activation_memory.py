"""Peak of activation memory and time of a training step, without and with activation checkpointing.

    python benchmarks/activation_memory.py [--quick] [--json FILE]

A Transformer encoder of 24 layers and torchvision's ResNet-101, through the engine of `trainer fit` with
`train.activation_checkpointing` at `none`, `full` and a regular expression that names every second block. The peak
is what torch's allocator reports for one forward and backward pass; weights and gradients are allocated before and
don't count. It is the same in each run. Steps are timed in turns, interleaved.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells that there is no GPU

import torch  # reads the variable above
from harness import Goal, Row, finish, parse_arguments
from torch import Tensor, nn
from torchvision.models import resnet101
from workloads.peak_memory import peak_bytes

from trainer.component import Component
from trainer.config import Train
from trainer.engine import Engine
from trainer.world import World

GOAL = Goal("none", 0.6)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(d_model=256, nhead=4, dim_feedforward=1024, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, num_layers=24, enable_nested_tensor=False)


@dataclass(frozen=True)
class Case:
    """A deep model, its input, and the expression that names every second of its blocks."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    every_second: str


ENCODER = Case("Transformer, 24 layers", encoder, (8, 128, 256), r"layers\.\d*[02468]")
RESNET = Case("ResNet-101", resnet101, (8, 3, 96, 96), r"layer\d\.\d*[02468]")
SMALL = Case("Transformer, 24 layers", encoder, (2, 64, 256), r"layers\.\d*[02468]")


class Step:
    """A forward and backward pass through the engine."""

    def __init__(self, case: Case, which: str) -> None:
        torch.manual_seed(0)
        self.engine = Engine(
            Component("strategy", "single", {}), Train(device="cpu", activation_checkpointing=which), World()
        )
        self.engine.setup(case.build(), lambda model: [torch.optim.SGD(model.parameters(), lr=0.1)])
        self.input = torch.randn(case.shape)
        self()  # allocates the gradients, which stay

    def __call__(self) -> Tensor:
        loss = self.engine.model(self.input).square().mean()
        self.engine.backward(loss, 1.0)
        return loss.detach()

    def seconds(self) -> float:
        began = time.perf_counter()
        self()
        return time.perf_counter() - began


def measure(case: Case, rounds: int) -> list[Row]:
    steps = {"none": Step(case, "none"), "full": Step(case, "full"), case.every_second: Step(case, case.every_second)}
    memory = {which: [peak_bytes(step) / 1e6] for which, step in steps.items()}
    times: dict[str, list[float]] = {which: [] for which in steps}
    for _ in range(rounds):
        for which, step in steps.items():
            times[which].append(step.seconds())
    rows = []
    for which in ("full", case.every_second):
        goal = GOAL if which == "full" else None
        notes = {"saved": 1 - memory[which][0] / memory["none"][0]}
        rows.append(
            Row(f"{case.name}, {which}: peak", "MB", memory[which], {"none": memory["none"]}, "lower", goal, notes)
        )
        rows.append(Row(f"{case.name}, {which}: step", "s", times[which], {"none": times["none"]}, "lower"))
    return rows


def main() -> None:
    arguments = parse_arguments(__doc__)
    cases, rounds = ((SMALL,), 3) if arguments.quick else ((ENCODER, RESNET), 15)
    rows = [row for case in cases for row in measure(case, rounds)]
    finish("Activation checkpointing", rows, arguments.json, ("torch", "torchvision", "lightning"))


if __name__ == "__main__":
    main()

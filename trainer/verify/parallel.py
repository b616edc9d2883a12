"""`trainer verify --parallel`: do all ways to train a config give the same numbers? No torch at import.

One process is the reference; accumulation, DDP and FSDP train on the same global batches, cut in their own ways. Each
is listened to in its first step, so that a difference is followed to the module where it begins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import RunConfig
from trainer.errors import TrainerError
from trainer.load import dump, load
from trainer.verify import Launch, Order, Say, only_run, run_probe

if TYPE_CHECKING:
    from trainer.verify.compare_steps import Heard, Place

STEPS = 3
PROCESSES = 2
TOLERANCES = {"32": 1e-4, "16-mixed": 2e-2, "bf16-mixed": 5e-2, "bf16": 5e-2}
"""By `train.precision`: rounding is some hundred times smaller in fp32, some times smaller in half precision."""
COARSE = ("adamw8bit", "muon")
"""Optimizers that compute in half precision or less by themselves: their steps are compared as such."""
REFERENCE = "one process"
SHIPPED = ("auto", "single", "ddp", "fsdp")
LATER_LOSS = "later loss"
BATCH_STATISTICS = "it uses the statistics of the samples that one device sees at once; group or layer norm do not"
HINTS = {
    "weights before": "the model is initialised with other numbers in each world: draw them from torch's generator",
    "loss scale": "with train.precision=16-mixed, steps are left out in which a scaled gradient overflows, and that "
    "depends on how the batch is cut: lower the loss, or use bf16-mixed",
    "samples": "the ways to train saw other samples: this is a fault of trainer",
    "batch": "the batch itself differs: draw a sample's randomness from trainer.task.sample_seed(seed, epoch, index)",
    "input": "the task prepares the batch by itself in a way that depends on how it is cut, as mixup and cutmix do, "
    "which pair the samples of a micro-batch",
    "module": "what it gives for a sample depends on the other samples, or on numbers drawn in the forward pass",
    "loss": "the model gives the same, so the loss depends on how the batch is cut: return the sum over the samples "
    "and their count (or summed weights), no mean",
    "gradient": "the loss is the same, so the gradients are not those of a sum over samples: a hook that changes them, "
    "a parameter that is used in one process only, or a forward pass outside of the wrapped model",
    "weights after": "the gradients are the same, so the optimizer makes another step of them",
    LATER_LOSS: "the first step is the same to its gradients, so weights or state drifted apart in the steps after it",
}
"""Where a difference begins -> what usually causes it."""


@dataclass(frozen=True)
class Way:
    """One way to train the same global batches."""

    name: str
    strategy: str
    processes: int
    batch_size: int
    accumulate: int
    required: bool
    """Whether it must run: what the config itself asks for, and accumulation."""


@dataclass(frozen=True)
class Outcome:
    """How one way compares with the reference; all differences are relative, the largest."""

    way: Way
    error: str | None
    """Why it did not run."""
    losses: float | None = None
    """Over all steps."""
    gradients: float | None = None
    """Of the first step, right before the optimizer."""
    weights: float | None = None
    """After the last step."""
    place: Place | None = None
    hint: str | None = None

    @property
    def is_good(self) -> bool:
        """Whether it is the same; one that did not run is no fault, unless the config asks for it."""
        return self.place is None if self.error is None else not self.way.required


@dataclass(frozen=True)
class Parallel:
    """How all of it went."""

    steps: int
    global_batch: int
    tolerance: float
    weight_tolerance: float
    """The same, but for optimizers that compute in lower precision by themselves."""
    reference: Way
    outcomes: list[Outcome]
    silenced: dict[str, int]
    """Modules that draw for each rank by itself, which were switched off, by class."""

    @property
    def is_good(self) -> bool:
        return all(outcome.is_good for outcome in self.outcomes)


def verify_parallel(
    config: RunConfig,
    steps: int,
    processes: int,
    tolerance: float | None,
    folder: Path,
    say: Say,
    start: Launch,
) -> Parallel:
    """Train every way in `folder` and compare; TrainerError where the reference itself fails."""
    limit = TOLERANCES[config.train.precision] if tolerance is None else tolerance
    of_weights = max(limit, TOLERANCES["bf16"]) if tolerance is None and config.optimizer.name in COARSE else limit
    size, accumulate = config.loading.batch_size, config.train.accumulate
    reference = Way(REFERENCE, "single", 1, size * processes, accumulate, True)
    largest = size * processes * accumulate
    # One less than what fits: slices of different size, by which a task that returns means is found out.
    global_batch = largest - 1 if largest > 2 else largest
    say(f"{REFERENCE}, {steps} steps with a global batch of {global_batch} ...")
    ours, losses = _train(config, reference, steps, global_batch, folder, start)
    outcomes = []
    for way in ways(config, processes):
        say(f"{way.name} ...")
        try:
            theirs, their_losses = _train(config, way, steps, global_batch, folder, start)
        except TrainerError as error:
            outcomes.append(Outcome(way, str(error)))
        else:
            outcomes.append(_compare(way, ours, losses, theirs, their_losses, limit, of_weights))
    return Parallel(len(losses), global_batch, limit, of_weights, reference, outcomes, ours.silenced)


def ways(config: RunConfig, processes: int) -> list[Way]:
    """What is compared with one process: the same global batch in other pieces."""
    size, accumulate, own = config.loading.batch_size, config.train.accumulate, config.strategy.name
    strategies = ["ddp", "fsdp"] if own in SHIPPED else ["ddp", "fsdp", own]
    wanted = "ddp" if own in ("auto", "single") else own
    return [
        Way("accumulation", "single", 1, size, accumulate * processes, True),
        *(Way(name, name, processes, size, accumulate, name == wanted) for name in strategies),
    ]


def overrides(way: Way, steps: int, runs_dir: Path) -> list[str]:
    """What makes a config train one way, and nothing but train."""
    return [
        f"strategy={way.strategy}",
        f"data.batch_size={way.batch_size}",
        f"train.accumulate={way.accumulate}",
        f"train.max_steps={steps}",
        "train.max_epochs=null",
        "train.log_every=1",
        "checkpoint.monitor=null",
        "checkpoint.every_steps=null",
        "checkpoint.every_minutes=null",
        "checkpoint.every_epochs=null",
        "evaluate.test=false",
        "tracking.enabled=false",
        "resume=never",
        f"runs_dir={runs_dir}",
    ]


def _train(
    config: RunConfig, way: Way, steps: int, global_batch: int, folder: Path, start: Launch
) -> tuple[Heard, list[float]]:
    """What was heard of the first step, and the losses of all steps."""
    from trainer.verify import compare_steps

    place = folder / way.name.replace(" ", "-")
    place.mkdir()
    path = place / "config.yaml"
    path.write_text(dump(config))
    path.write_text(dump(load(path, overrides(way, steps, place / "runs"))))
    order = Order(str(path), str(place / "heard"), global_batch=global_batch, across_worlds=True)
    run_probe(order, way.processes, start)
    run = only_run(place / "runs", config.name)
    losses = [entry["train/loss"] for entry in run.read_metrics() if "train/loss" in entry]
    return compare_steps.read(place / "heard", way.processes, run), losses


def _compare(
    way: Way,
    ours: Heard,
    our_losses: list[float],
    theirs: Heard,
    their_losses: list[float],
    limit: float,
    of_weights: float,
) -> Outcome:
    from trainer.verify import compare_steps

    by_step = [_ratio(one, other) for one, other in zip(our_losses, their_losses, strict=True)]
    losses = max(by_step, default=0.0)
    gradients = max(compare_steps.gradient_differences(ours, theirs).values(), default=0.0)
    weights = max(compare_steps.weight_differences(ours, theirs, limit).values(), default=0.0)
    place = compare_steps.first_place(ours, theirs, limit, of_weights)
    if place is None and losses > limit:
        step = next(step for step, ratio in enumerate(by_step, 1) if ratio > limit)
        place = compare_steps.Place(LATER_LOSS, f"step {step}", "", by_step[step - 1])
    return Outcome(way, None, losses, gradients, weights, place, None if place is None else _hint(place))


def _hint(place: Place) -> str:
    if place.stage == "module" and "BatchNorm" in place.kind:
        return BATCH_STATISTICS
    return HINTS[place.stage]


def _ratio(one: float, other: float) -> float:
    if one == other or (math.isnan(one) and math.isnan(other)):
        return 0.0
    return abs(one - other) / abs(one) if one and math.isfinite(one) and math.isfinite(other) else math.inf

"""A run's checkpoint with what evaluates it, as its own evaluation does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trainer import random_state
from trainer.assembly import base_of, build_data, build_task
from trainer.checkpoint import Checkpoint
from trainer.closing import load_for_evaluation
from trainer.component import Component
from trainer.config import RunConfig
from trainer.ema import WeightAverage
from trainer.engine import Engine
from trainer.errors import UserError
from trainer.evaluate import choose
from trainer.run import Run
from trainer.task import Batch, Dataset, Servable, Task
from trainer.world import World


@dataclass(frozen=True)
class Opened:
    """One checkpoint, its weights (or their average) in the task's model, in evaluation mode."""

    run: Run
    config: RunConfig
    checkpoint: Checkpoint
    task: Task
    servable: Servable
    engine: Engine
    split: str
    """Where golden requests and the comparison come from: `val`, else `test`, else `train`."""
    dataset: Dataset
    """That split, seen as at evaluation."""

    @property
    def batch_size(self) -> int:
        """Of an evaluation."""
        return self.config.evaluate.batch_size or self.config.loading.batch_size

    def answers(self, batch: Batch) -> list[Tensor]:
        """The evaluation's own answers to a batch, on the CPU."""
        with torch.no_grad(), self.engine.forward_context():
            found = self.servable.answer(self.engine.bare, self.engine.cast(batch))
        return [part.detach().cpu() for part in found]

    def batch(self, indices: Sequence[int], epoch: int = 0) -> tuple[Batch, list[int]]:
        """Samples on the device, and the indices of those that could be read."""
        batch = self.dataset.batch(indices, epoch)
        bad = {index for index, _ in batch["bad"]}
        moved = {k: v.to(self.engine.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        return moved, [index for index in indices if index not in bad]


@contextmanager
def opened(run: Run, config: RunConfig, which: str, say: Callable[[str], None]) -> Iterator[Opened]:
    """Open the checkpoint `which` (`best`, `newest` or a step) in this one process, whatever trained it.

    Raises UserError for a task that does not say how it is served, or data without samples.
    """
    # Compiled blocks and checkpointed activations compute the same, but can't be exported.
    train = replace(config.train, compile=False, activation_checkpointing="none")
    engine = Engine(Component("strategy", "auto", {}), train, World())
    try:
        found = choose(run.checkpoints, config, which, say)
        random_state.seed_everything(config.seed)
        task = build_task(config, build_data(config))
        servable = task.servable()
        split, dataset = _evaluated(task.data)
        engine.setup(task.model, lambda model: [], base_of(task))
        ema = WeightAverage(engine.kept(), config.train.ema_decay) if config.train.ema_decay else None
        load_for_evaluation(engine, ema, found)
        servable.module.eval()
        engine.bare.eval()
        with ema.in_place_of_weights() if ema else nullcontext():
            yield Opened(run, config, found, task, servable, engine, split, dataset)
    finally:
        engine.close()


def _evaluated(data: Any) -> tuple[str, Dataset]:
    for name in ("val", "test"):
        dataset = data.split(name)
        if dataset is not None and len(dataset):
            return name, dataset
    # Training samples are augmented: data sets that keep a view of them as at evaluation are asked for it.
    dataset = getattr(data, "evaluated", None) or data.split("train")
    if dataset is None or not len(dataset):
        raise UserError("RUN: its data set has no sample, so there is nothing to prove a bundle on")
    return "train", dataset

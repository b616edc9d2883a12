"""Exact evaluation: every sample of a split once, sums over batches and ranks, metrics at the end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass

import torch

from trainer.config import Loading
from trainer.ema import WeightAverage
from trainer.engine import Engine
from trainer.loading import load
from trainer.sampling import Plan
from trainer.task import Dataset, Metrics, Task


@dataclass(frozen=True)
class Evaluation:
    """Result of one pass over a split, the same on every rank."""

    metrics: Metrics
    bad: list[tuple[int, str]]
    """Samples that could not be read, as (index, reason); they are in no metric."""


def evaluate(
    engine: Engine,
    task: Task,
    dataset: Dataset,
    loading: Loading,
    ema: WeightAverage | None,
    beat: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluate `dataset` with the averaged weights where there are any. All ranks take part.

    `beat` is called with each batch: a sign of life.
    """
    plan = Plan(len(dataset), loading.batch_size, engine.world.size)
    metrics = task.metrics(engine.device)
    bad: list[tuple[int, str]] = []
    # A DDP wrapper would exchange buffers in each forward, which ranks with other batches don't answer.
    model = engine.model if engine.sharded else engine.bare
    engine.share_buffers(ema.tensors if ema else {})
    model.eval()
    batches = load(dataset, plan.evaluation(engine.world.rank), loading, engine.device)
    with torch.no_grad(), ema.in_place_of_weights() if ema else nullcontext(), closing(batches):
        for loaded in batches:
            beat()
            bad += [] if loaded.micro.filler else loaded.batch["bad"]
            if loaded.filler and not engine.sharded:
                continue
            # A sharded model gathers its weights in every forward: a rank without samples takes part all the same.
            into = task.metrics(engine.device) if loaded.filler else metrics
            with engine.forward_context():
                task.evaluate(model, engine.cast(loaded.batch), into)
        engine.release_gathered_weights()
    model.train()
    engine.add_up_tensors(metrics.sums)
    return Evaluation(metrics, sorted({sample for part in engine.gather(bad) for sample in part}))

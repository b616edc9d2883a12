"""Before the first step and after the last: what a training began with, its test, its result for other programs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer import checkpoint, saving, state
from trainer.checkpoint import Checkpoint
from trainer.ema import WeightAverage
from trainer.engine import Engine
from trainer.errors import UserError
from trainer.loop import Job
from trainer.peft_adapter import write_adapter
from trainer.task import Data, Dataset, Difference, Metrics

Compared = dict[str, list[Difference]]
BEFORE = "before"
"""Folder of `artifacts/` for the evaluation before the first step."""


def evaluate_first(job: Job, data: Data) -> None:
    """Evaluate the model as it is before the first step, where `evaluate.at_start` asks for it; every rank calls it."""
    if job.task.answers_wanted and job.engine.sharded:
        raise UserError("recipe.answers: a model that is sharded over processes can't answer; set it to 0, or use ddp")
    if not job.config.evaluate.at_start or job.progress.step > 0:
        return
    for split, dataset in _held_out(job, data).items():
        metrics = job.report.evaluate_split(job, split, dataset)
        job.report.picture(job, f"{BEFORE}/{split}", metrics)
        _answer(job, split, f"{BEFORE}/{split}")


def close(job: Job, data: Data, folder: Path, say: Callable[[str], None]) -> Compared:
    """Load the best weights, test them, compare them with the start, write the adapter; every rank calls it.

    Returns, on rank 0, what changed on each split where the start was evaluated.
    """
    held_out = _held_out(job, data)
    is_earlier = _load_best(job, "test" in held_out, folder, say)
    compared: Compared = {}
    for split, dataset in held_out.items():
        metrics = job.report.final if split == "val" and not is_earlier else None
        if metrics is None and (split == "test" or job.config.evaluate.at_start):
            metrics = job.report.evaluate_split(job, split, dataset)
            job.report.picture(job, split, metrics)
        if metrics is not None and job.report.run is not None:
            compared |= _compared(job.report.run.artifacts, split, metrics)
        said = _answer(job, split, split)
        if said and job.report.run is not None:
            more = job.task.compare_answers(said, job.report.run.artifacts / BEFORE / split)
            compared |= {split: [*compared.get(split, []), *more]} if more else {}
    _write_adapter(job, folder)
    return compared


def load_for_evaluation(engine: Engine, ema: WeightAverage | None, found: Checkpoint) -> None:
    """Put the weights, and the averaged weights, of a checkpoint into the engine's model."""
    state.load_weights(engine, ema, saving.load(found.path, found.manifest, engine))


def _answer(job: Job, split: str, place: str) -> list[dict[str, Any]]:
    """Let the model answer some samples of a split, log how well, and write the answers into `artifacts/<place>/`."""
    if not job.task.answers_wanted:
        return []
    engine, world = job.engine, job.engine.world
    averaged = job.ema.in_place_of_weights() if job.ema is not None else nullcontext()
    with torch.no_grad(), averaged, engine.forward_context():
        mine = job.task.answers(split, world.rank, world.size, partial(job.heart.beat, "answer"))
    every = [answer for part in engine.gather(mine) for answer in part]
    run = job.report.run
    if every and run is not None:
        (run.artifacts / place).mkdir(parents=True, exist_ok=True)
        metrics = job.task.judge(every, run.artifacts / place)
        job.report.log(job.progress, {f"{split}/{name}": value for name, value in metrics.items()})
    return every


def _held_out(job: Job, data: Data) -> dict[str, Dataset]:
    found = {"val": job.val_set, "test": data.split("test") if job.config.evaluate.test else None}
    return {split: dataset for split, dataset in found.items() if dataset is not None and len(dataset)}


def _load_best(job: Job, is_tested: bool, folder: Path, say: Callable[[str], None]) -> bool:
    """The best weights, where `checkpoint.monitor` names them and something is yet to be done; whether those are
    of an earlier step."""
    config = job.config
    rule, is_needed = config.checkpoint, config.adapter is not None or is_tested or config.evaluate.at_start
    if rule.monitor is None or not is_needed:
        return False
    job.heart.beat("test")
    monitor, mode = rule.monitor, rule.mode
    best = job.engine.on_main(lambda: checkpoint.best_whole(folder / "checkpoints", monitor, mode, say))
    if best is None or best.manifest.step == job.progress.step:
        return False
    load_for_evaluation(job.engine, job.ema, best)
    return True


def _compared(artifacts: Path, split: str, metrics: Metrics) -> Compared:
    before = artifacts / BEFORE / split
    found = metrics.compare(before) if before.is_dir() else []
    return {split: found} if found else {}


def _write_adapter(job: Job, folder: Path) -> None:
    """The adapter's weights, which are the best or the last ones, for other programs: `RUN/adapter/`."""
    if job.config.adapter is None:
        return
    job.heart.beat("save")
    tensors = state.whole(job.ema.tensors if job.ema is not None else job.engine.kept())
    job.engine.on_main(lambda: write_adapter(job.task, tensors, folder / "adapter"))

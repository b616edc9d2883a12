"""Evaluating a run, or one of its checkpoints, on any split."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from trainer import checkpoint, random_state
from trainer.assembly import base_of, build_data, build_task
from trainer.checkpoint import Checkpoint
from trainer.closing import load_for_evaluation
from trainer.component import Component
from trainer.config import RunConfig
from trainer.ema import WeightAverage
from trainer.engine import Engine
from trainer.errors import TrainerError, UserError
from trainer.evaluation import evaluate
from trainer.fit import Say
from trainer.report import write_pictures
from trainer.run import Run
from trainer.world import World


@dataclass(frozen=True)
class Result:
    """Metrics of one checkpoint on one split; the same on every rank."""

    checkpoint: str
    split: str
    samples: int
    bad_samples: int
    metrics: dict[str, float]


def evaluate_run(run: Run, config: RunConfig, which: str, split: str, world: World, say: Say) -> Result:
    """Evaluate the checkpoint `which` (`best`, `newest` or a step) of `run` on `split`.

    Pictures and tables go to the run's artifacts. Raises UserError for a split or a checkpoint that is not there.
    """
    # A run of many processes may be evaluated by one.
    strategy = config.strategy if world.launched else Component("strategy", "auto", {})
    engine = Engine(strategy, config.train, world)
    try:
        found = engine.from_main(choose(run.checkpoints, config, which, say) if world.is_main else None)
        assert found is not None
        random_state.seed_everything(config.seed)
        data = build_data(config)
        dataset = data.split(split)
        if dataset is None or len(dataset) == 0:
            there = [name for name in ("train", "val", "test") if data.split(name) is not None]
            raise UserError(f"--split: the data set has no split {split!r}; it has: {', '.join(there)}")
        task = build_task(config, data)
        dataset = task.data.split(split)
        assert dataset is not None
        engine.setup(task.model, lambda model: [], base_of(task))
        ema = WeightAverage(engine.kept(), config.train.ema_decay) if config.train.ema_decay else None
        load_for_evaluation(engine, ema, found)
        loading = replace(config.loading, batch_size=config.evaluate.batch_size or config.loading.batch_size)
        result = evaluate(engine, task, dataset, loading, ema)
        if len(result.bad) > config.loading.max_bad_samples:
            raise UserError(
                f"{len(result.bad)} samples of {split} can't be read and data.max_bad_samples is "
                f"{config.loading.max_bad_samples}: {result.bad[0][1]}"
            )
        if world.is_main:
            write_pictures(run, split, result.metrics)
        return Result(found.path.name, split, len(dataset), len(result.bad), result.metrics.compute())
    finally:
        engine.close()


def choose(folder: Path, config: RunConfig, which: str, say: Say) -> Checkpoint:
    """The whole checkpoint that `which` names; the best falls back to the newest where nothing was monitored."""
    if which.isdigit():
        path = folder / checkpoint.folder_name(int(which))
        if not path.is_dir():
            steps = ", ".join(str(int(p.name.rpartition("-")[2])) for p in checkpoint.present(folder)) or "none"
            raise UserError(f"--checkpoint: there is none of step {which}; there are: {steps}")
        found = checkpoint.read(path)
        checkpoint.verify(found)
        return found
    monitor = config.checkpoint.monitor
    if which == "best" and monitor is not None:
        top = checkpoint.best(folder, monitor, config.checkpoint.mode)
        if top is not None:
            checkpoint.verify(top)
            return top
    newest = checkpoint.newest_whole(folder, say)
    if newest is None:
        raise TrainerError(f"{folder}: there is no whole checkpoint to evaluate; train first, or go on with --resume")
    return newest

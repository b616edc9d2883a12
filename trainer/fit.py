"""One training run from config to result: assembles the parts, and writes down how it ended."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from trainer import checkpoint, failures, random_state, saving, state
from trainer.checkpoint import Checkpoint
from trainer.config import RunConfig
from trainer.ema import WeightAverage
from trainer.engine import Engine
from trainer.errors import Preempted, UserError
from trainer.evaluation import evaluate
from trainer.loop import Job, train
from trainer.preemption import Preemption
from trainer.progress import Progress as Display
from trainer.report import Report, known_bad_samples, write_pictures
from trainer.resume import begin, go_back
from trainer.run import Run
from trainer.sampling import Plan
from trainer.saving import Saver
from trainer.task import Data, Dataset, Task
from trainer.tracking import Tracker
from trainer.world import World

Say = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """How a run ended; on rank 0."""

    run: Path
    metrics: dict[str, float]
    """Last values of `val/...` and `test/...`."""
    samples_per_second: float
    data_wait: float
    """Share of the training time spent waiting for data."""
    steps: int
    warning: str | None
    """What the user should know about tracking; None when all is well."""


def fit(
    config: RunConfig, resume: Run | None, world: World, say: Say, prepare: Callable[[Job], None] | None = None
) -> Result | None:
    """Train as `config` says, going on with `resume` where given; the result on rank 0, None on the others.

    `prepare` is called on every rank with the assembled job, before its first step: `trainer verify` listens in there.
    Raises UserError for what the config asks wrongly, Preempted when stopped by a signal with a checkpoint written.
    """
    with Preemption() as preemption:
        engine = Engine(config.strategy, config.train, world)
        try:
            return _fit(config, resume, engine, preemption, say, prepare)
        finally:
            engine.close()


def _fit(
    config: RunConfig,
    resume: Run | None,
    engine: Engine,
    preemption: Preemption,
    say: Say,
    prepare: Callable[[Job], None] | None,
) -> Result | None:
    random_state.seed_everything(config.seed)
    data: Data = config.data.build(seed=config.seed)
    task: Task = config.recipe.build(model=config.model, data=data)
    train_set = _train_split(data)
    plan = make_plan(config, len(train_set), engine.world.size)
    engine.setup(task.model, lambda model: config.optimizer.build(model=model))
    ema = WeightAverage(engine.bare, config.train.ema_decay) if config.train.ema_decay else None

    main = engine.world.is_main
    folder = engine.on_main(lambda: begin(config, resume, engine.world.size, data.fingerprint, say).path)
    run = Run(folder) if main else None
    say(f"run directory: {folder}")
    tracker: Tracker | None = None
    job: Job | None = None
    try:
        tracker = Tracker(run, config.tracking) if run is not None and config.tracking.enabled else None
        job = _make_job(config, engine, task, data, train_set, plan, ema, run, folder, preemption, say)
        if prepare is not None:
            prepare(job)
        if tracker is not None:
            tracker.start()
        done = train(job)
        job.saver.wait()
        metrics = _last_metrics(run)
        if done:
            metrics |= _test(config, job, data, folder, say)
    except BaseException as error:
        cause = failures.note(folder, engine.world, error)
        if job is not None:
            job.saver.settle()
        if run is not None:
            run.close()
            run.end_attempt("failed", failures.describe(cause))
            _finish(tracker, "failed", job)
        if cause is not error:
            raise cause from error
        raise
    status = "finished" if done else "preempted"
    reason = None if done else next(name for name in engine.gather(preemption.signal_name) if name)
    warning = None
    if run is not None:
        run.end_attempt(status, reason)
        warning = _finish(tracker, status, job)
        run.close()
    if not done:
        engine.from_main(None)  # the first rank that ends with an error has the launcher end the others
        raise Preempted(
            f"stopped by {reason} at step {job.progress.step} with a checkpoint written; "
            f"go on with: trainer fit --resume {folder}"
        )
    if run is None:
        return None
    return Result(run.path, metrics, steps=job.progress.step, warning=warning, **job.report.summary())


def make_plan(config: RunConfig, num_samples: int, world_size: int) -> Plan:
    """How the training set is cut into steps; a UserError when one step would need more than there is."""
    loading = config.loading
    plan = Plan(num_samples, loading.batch_size, world_size, config.train.accumulate, config.seed, loading.drop_last)
    if plan.global_batch > num_samples:
        raise UserError(
            f"data.batch_size: a global batch of {plan.global_batch} ({loading.batch_size} × {world_size} processes × "
            f"{config.train.accumulate} accumulated) is more than the {num_samples} training samples; make it smaller"
        )
    return plan


def _make_job(
    config: RunConfig,
    engine: Engine,
    task: Task,
    data: Data,
    train_set: Dataset,
    plan: Plan,
    ema: WeightAverage | None,
    run: Run | None,
    folder: Path,
    preemption: Preemption,
    say: Say,
) -> Job:
    saver = Saver(folder / "checkpoints", config.checkpoint, engine)
    progress = _restore(config, engine, ema, folder, say)
    bad = engine.on_main(lambda: known_bad_samples(folder))
    left = plan.steps_left(progress.consumed, config.train.max_epochs) if config.train.max_epochs else math.inf
    total_steps = int(min(progress.step + left, config.train.max_steps or math.inf))
    display = Display(total_steps, plan.steps_per_epoch, progress.step) if run is not None else None
    return Job(
        config=config,
        engine=engine,
        task=task,
        train_set=train_set,
        val_set=data.split("val"),
        plan=plan,
        total_steps=total_steps,
        schedule=config.schedule.build(total_steps=total_steps),
        ema=ema,
        progress=progress,
        saver=saver,
        report=Report(run, display, len(train_set), config.loading.max_bad_samples, bad=bad),
        preemption=preemption,
        loading=config.loading,
        eval_loading=replace(config.loading, batch_size=config.evaluate.batch_size or config.loading.batch_size),
    )


def _restore(config: RunConfig, engine: Engine, ema: WeightAverage | None, folder: Path, say: Say) -> state.Progress:
    """Load the newest whole checkpoint of the run into the engine, or start from the beginning."""
    found = engine.on_main(lambda: go_back(Run(folder), say))
    if found is None:
        # From here on ranks differ: each draws its own dropout.
        random_state.seed_everything(random_state.rank_seed(config.seed, engine.world.rank))
        return state.Progress()
    say(f"going on from {found.path.name}")
    loaded = saving.load(found.path, found.manifest, engine)
    return state.restore(engine, ema, loaded, config.seed)


def _train_split(data: Data) -> Dataset:
    train_set = data.split("train")
    if train_set is None or len(train_set) == 0:
        raise UserError("data: the data set has no training samples")
    return train_set


def _last_metrics(run: Run | None) -> dict[str, float]:
    """The last value of each `val/` metric."""
    metrics: dict[str, float] = {}
    for entry in run.read_metrics() if run is not None else ():
        metrics |= {name: value for name, value in entry.items() if name.startswith("val/")}
    return metrics


def _test(config: RunConfig, job: Job, data: Data, folder: Path, say: Say) -> dict[str, float]:
    """Evaluate once on the test split, with the best weights where `checkpoint.monitor` names them."""
    test_set = data.split("test")
    if not config.evaluate.test or test_set is None:
        return {}
    rule = config.checkpoint
    if rule.monitor is not None:
        monitor, mode = rule.monitor, rule.mode
        best = job.engine.on_main(lambda: checkpoint.best_whole(folder / "checkpoints", monitor, mode, say))
        if best is not None and best.manifest.step != job.progress.step:
            load_for_evaluation(job.engine, job.ema, best)
    result = evaluate(job.engine, job.task, test_set, job.eval_loading, job.ema)
    job.report.bad_samples("test", result.bad)
    metrics = {f"test/{name}": value for name, value in result.metrics.compute().items()}
    if job.report.run is not None:
        job.report.log(job.progress, metrics)
        write_pictures(job.report.run, "test", result.metrics)
    return metrics


def load_for_evaluation(engine: Engine, ema: WeightAverage | None, found: Checkpoint) -> None:
    """Put the weights, and the averaged weights, of a checkpoint into the engine's model."""
    loaded = saving.load(found.path, found.manifest, engine)
    state.load_weights(engine.bare, loaded.model)
    if ema is not None:
        state.load_average(ema, loaded)


def _finish(tracker: Tracker | None, status: str, job: Job | None) -> str | None:
    if job is not None and job.report.display is not None:
        job.report.display.close()
    # A scheduler that wants its machine back does not wait long; `trainer runs sync` sends the rest.
    patience = 10.0 if status == "preempted" else 30.0
    return tracker.finish(status, patience) if tracker is not None else None

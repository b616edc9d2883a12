"""One training run from config to result: assembles the parts, and writes down how it ended."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from trainer import failures, health, random_state, saving, state
from trainer.assembly import base_of, build_data, build_task
from trainer.checkpoint import Checkpoint, Manifest
from trainer.closing import Compared, close, evaluate_first
from trainer.config import RunConfig
from trainer.ema import WeightAverage
from trainer.engine import Engine
from trainer.errors import Followed, Preempted, TrainerError, UserError
from trainer.health import Heartbeat
from trainer.loop import Job, train
from trainer.non_finite import Guard
from trainer.preemption import Preemption
from trainer.progress import Progress as Display
from trainer.report import Report, known_bad_samples
from trainer.resume import begin, find_unfinished, go_back
from trainer.run import FINISHED, PREEMPTED, STOPPED, Run
from trainer.sampling import Plan
from trainer.saving import Saver
from trainer.stragglers import Stragglers
from trainer.task import Data, Dataset, Task
from trainer.tracking import Tracker
from trainer.verdict import PAUSE_REASON
from trainer.watchdog import Watchdog
from trainer.world import World

Say = Callable[[str], None]
Tell = Callable[[BaseException], None]
END_SECONDS = 45.0
"""How long a rank that failed may take to put its affairs in order before its watchdog ends it."""


@dataclass(frozen=True)
class Result:
    """How a run ended; on rank 0."""

    run: Path
    metrics: dict[str, float]
    """Last values of `val/...` and `test/...`."""
    samples_per_second: float
    tokens_per_second: float
    """Of text, padding not counted; 0 where the data are none."""
    data_wait: float
    """Share of the training time spent waiting for data."""
    steps: int
    warning: str | None
    """What the user should know about tracking; None when all is well."""
    compared: Compared
    """Split -> what changed between the evaluation before the first step and the last one."""
    stopped: bool = False
    """Whether it was judged to end before its last step, see `Job.judge`."""


@dataclass
class _Parts:
    """What one rank has set up before its watchdog begins."""

    data: Data
    task: Task
    train_set: Dataset
    ema: WeightAverage | None
    folder: Path
    run: Run | None
    """On rank 0 only."""
    tracker: Tracker | None = None
    job: Job | None = None
    compared: Compared = field(default_factory=dict)


def fit(
    config: RunConfig,
    resume: Run | None,
    world: World,
    say: Say,
    preemption: Preemption | None = None,
    tell: Tell = lambda error: None,
    prepare: Callable[[Job], None] | None = None,
) -> Result | None:
    """Train as `config` says, going on with `resume` where given; the result on rank 0, None on the others.

    `tell` prints an error at once, on the rank that is to tell it, before its connections close. `prepare` is called
    on every rank with the assembled job, before its first step: `trainer verify` listens in there.

    Raises UserError for what the config asks wrongly, Preempted when stopped by a signal, or judged to pause, with a
    checkpoint written.
    """
    with preemption or Preemption() as wish:
        engine = Engine(config.strategy, config.train, world)
        try:
            parts = _set_up(config, resume, engine, say, tell)
            wish.take_interrupts()
            heart = Heartbeat(parts.folder, world.rank)
            with Watchdog(parts.folder, world, heart, config.train.step_timeout, tell) as watchdog:
                try:
                    status = _train(config, parts, engine, wish, heart, say, prepare)
                except BaseException as error:
                    watchdog.end_within(END_SECONDS)
                    raise _conclude(parts, world, error, say, tell) from error
            return _end(status, parts, engine, wish)
        finally:
            engine.close()


def _set_up(config: RunConfig, resume: Run | None, engine: Engine, say: Say, tell: Tell) -> _Parts:
    """Data, model and run directory. An error here is told by one rank, too: the others only see it go."""
    try:
        random_state.seed_everything(config.seed)
        built = build_data(config)
        random_state.seed_everything(config.seed)  # the weights are the same whether the data were built here or kept
        task = build_task(config, built)
        data = task.data  # the recipe's: of conversations it makes tokens
        train_set = _train_split(data)
        engine.setup(task.model, lambda model: config.optimizer.build(model=model), base_of(task))
        ema = WeightAverage(engine.kept(), config.train.ema_decay) if config.train.ema_decay else None
        run: Run | None = None

        def start() -> Path:
            nonlocal run
            earlier = resume or (find_unfinished(config) if config.resume == "auto" else None)
            if earlier is None:
                make_plan(config, len(train_set), engine.world.size)  # before there is a folder
            run = begin(config, earlier, engine.world.size, data.fingerprint, say)
            health.clear(run.path)
            return run.path

        folder = engine.on_main(start)
    except Exception as error:
        if not engine.is_first_to_tell(failures.patience(error, engine.world)):
            raise Followed("ended by the failure of another rank, which tells its cause", error) from error
        tell(error)
        raise
    for line in getattr(data, "notes", ()):
        say(line)
    say(f"run directory: {folder}")
    return _Parts(data, task, train_set, ema, folder, run)


def _train(
    config: RunConfig,
    parts: _Parts,
    engine: Engine,
    preemption: Preemption,
    heart: Heartbeat,
    say: Say,
    prepare: Callable[[Job], None] | None,
) -> str:
    """From the newest checkpoint to the end, or to the first wish to stop; the status that the run ends with."""
    if parts.run is not None and config.tracking.enabled:
        parts.tracker = Tracker(parts.run, config.tracking, partial(_warn, parts, say))
    job = parts.job = _make_job(config, engine, parts, preemption, heart, say)
    if prepare is not None:
        prepare(job)
    if parts.tracker is not None:
        parts.tracker.start()
    evaluate_first(job, parts.data)
    status = train(job)
    heart.beat("save")
    job.saver.wait()
    if status == FINISHED:
        parts.compared = close(job, parts.data, parts.folder, say)
    _close_display(parts)
    heart.beat("end")
    return status


def _end(status: str, parts: _Parts, engine: Engine, preemption: Preemption) -> Result | None:
    """Write down how the run ended, and say it."""
    assert parts.job is not None
    reason = None
    if status == PREEMPTED:
        reason = next((name for name in engine.gather(preemption.signal_name) if name), PAUSE_REASON)
    warning, metrics = None, _last_metrics(parts.run)
    if parts.run is not None:
        if (unwritten := parts.run.end_attempt(status, reason)) is not None:
            raise TrainerError(unwritten)
        warning = _finish_tracking(parts, status)
        parts.run.close()
    if status == PREEMPTED:
        preemption.end()
        engine.from_main(None)  # the first rank that ends with an error has the launcher end the others
        raise Preempted(
            f"stopped by {reason} at step {parts.job.progress.step} with a checkpoint written; "
            f"go on with: trainer fit --resume {parts.folder}"
        )
    if parts.run is None:
        return None
    summary = parts.job.report.summary()
    return Result(
        parts.run.path,
        metrics,
        steps=parts.job.progress.step,
        warning=warning,
        compared=parts.compared,
        stopped=status == STOPPED,
        **summary,
    )


def _conclude(parts: _Parts, world: World, error: BaseException, say: Say, tell: Tell) -> BaseException:
    """Find the job's cause, have it told once, write it down; returns the error with which this rank ends."""
    failure, is_mine = failures.conclude(parts.folder, world, error)
    with suppress(TrainerError):  # it may be the display that can't be written to, and that is told below
        _close_display(parts)
    ending = error
    if is_mine:
        if failures.is_lost_connection(error):
            ending = TrainerError(failure.cause)
        tell(ending)
    else:
        where = parts.folder / "run.json"
        ending = Followed(f"ended by the failure of rank {failure.rank}, which tells its cause ({where})", error)
    if parts.job is not None:
        parts.job.saver.settle()
    if is_mine or parts.run is not None:
        run = parts.run or Run(parts.folder)
        run.close()
        unwritten = run.end_attempt("failed", failure.cause)
        unsent = _finish_tracking(parts, "failed")
        with suppress(TrainerError):  # see above
            for line in (unwritten, unsent):
                if line is not None:
                    say(f"warning: {line}")
    return ending


def make_plan(config: RunConfig, num_samples: int, world_size: int, before: Manifest | None = None) -> Plan:
    """How the training set is cut into steps, going on from the checkpoint `before` where there is one.

    Raises UserError when one step would need more than there is, or where `train.elastic` refuses.
    """
    loading, accumulate = config.loading, config.train.accumulate
    plan = Plan(num_samples, loading.batch_size, world_size, accumulate, config.seed, loading.drop_last)
    if before is not None and before.global_batch:
        plan = _elastic(plan, before, config.train.elastic)
    if plan.global_batch > num_samples:
        raise UserError(
            f"data.batch_size: a global batch of {plan.global_batch} ({loading.batch_size} × {world_size} processes × "
            f"{accumulate} accumulated) is more than the {num_samples} training samples; make it smaller"
        )
    return plan


def _elastic(plan: Plan, before: Manifest, policy: str) -> Plan:
    """Keep the global batch, unless it is the config that changed rather than the number of processes."""
    if plan.global_batch == before.global_batch:
        return plan
    if policy == "refuse" and plan.world_size != before.world_size:
        raise UserError(
            f"train.elastic: {plan.world_size} processes × {plan.batch_size} × {plan.accumulate} accumulated are a "
            f"global batch of {plan.global_batch}, and the run had {before.global_batch} with {before.world_size} "
            "processes: start as many, change data.batch_size or train.accumulate to match, or set "
            "train.elastic=accumulate"
        )
    if (plan.batch_size, plan.accumulate) != (before.batch_size, before.accumulate):
        return plan
    return replace(plan, kept_global_batch=before.global_batch)


def _make_job(
    config: RunConfig, engine: Engine, parts: _Parts, preemption: Preemption, heart: Heartbeat, say: Say
) -> Job:
    folder, train_set, world = parts.folder, parts.train_set, engine.world
    saver = Saver(folder / "checkpoints", config.checkpoint, engine, partial(_warn, parts, say))

    def newest() -> Checkpoint | None:
        return engine.on_main(lambda: go_back(parts.run or Run(folder), say))

    def restore() -> state.Progress:
        return _restore(config, engine, parts.ema, newest(), say)

    found = newest()
    plan = make_plan(config, len(train_set), world.size, found.manifest if found else None)
    if plan.kept_global_batch is not None and found is not None:
        say(
            f"{world.size} process(es) in place of {found.manifest.world_size}: "
            f"the global batch stays {plan.global_batch}"
        )
    progress = _restore(config, engine, parts.ema, found, say)
    guard = Guard(folder, config.train.non_finite, engine)
    length = plan.length(progress.step, progress.consumed, config.train, guard.left_out)
    display = Display(length.steps, plan.steps_per_epoch, progress.step) if parts.run is not None else None
    bad = engine.on_main(lambda: known_bad_samples(folder))
    return Job(
        config=config,
        engine=engine,
        task=parts.task,
        train_set=train_set,
        val_set=parts.data.split("val"),
        plan=plan,
        total_steps=length.steps,
        schedule=config.schedule.build(total_steps=length.scheduled),
        ema=parts.ema,
        progress=progress,
        saver=saver,
        report=Report(parts.run, display, len(train_set), config.loading.max_bad_samples, bad=bad),
        preemption=preemption,
        heart=heart,
        guard=guard,
        stragglers=Stragglers(world.rank, world.size),
        loading=config.loading,
        eval_loading=replace(config.loading, batch_size=config.evaluate.batch_size or config.loading.batch_size),
        go_back=restore,
    )


def _restore(
    config: RunConfig, engine: Engine, ema: WeightAverage | None, found: Checkpoint | None, say: Say
) -> state.Progress:
    """Load a checkpoint into the engine, or start from the beginning."""
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
    """The last value of each `val/` and `test/` metric."""
    metrics: dict[str, float] = {}
    for entry in run.read_metrics() if run is not None else ():
        metrics |= {name: value for name, value in entry.items() if name.startswith(("val/", "test/"))}
    return metrics


def _warn(parts: _Parts, say: Say, text: str) -> None:
    """A warning for the user, above the display where there is one."""
    (parts.job.report.tell if parts.job is not None else say)(f"warning: {text}")


def _close_display(parts: _Parts) -> None:
    if parts.job is not None and parts.job.report.display is not None:
        parts.job.report.display.close()


def _finish_tracking(parts: _Parts, status: str) -> str | None:
    # A scheduler that wants its machine back does not wait long, nor do ranks that see another one fail; the next
    # start or `trainer runs sync` sends the rest.
    patience = 30.0 if status in (FINISHED, STOPPED) else 10.0
    return parts.tracker.finish(status, patience) if parts.tracker is not None else None

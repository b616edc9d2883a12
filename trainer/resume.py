"""Which run to go on with, whether a config may go on with it, and from where. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from trainer import checkpoint, environment, failures
from trainer.checkpoint import Checkpoint
from trainer.config import RunConfig
from trainer.errors import TrainerError, UserError
from trainer.files import locked, reason, remedy, write_atomically
from trainer.lineage import lineage
from trainer.load import diff, dump, load
from trainer.run import FAILED, KILLED, PREEMPTED, RUNNING, Run, find_runs
from trainer.run_lock import acquire, wait_for_silence

FREE = ("train", "evaluate", "checkpoint", "tracking", "strategy", "resume", "runs_dir", "tune")
"""Sections that may change from one attempt to the next: they say how, not what, is learnt."""
AUTO_LOCK = ".auto.lock"
FREE_DATA = ("batch_size", "workers", "prefetch", "drop_last", "max_bad_samples")


def resumed_config(run: Run, config_name: str | None, overrides: Sequence[str]) -> RunConfig:
    """The run's own config with `overrides`, checked to be the same experiment; a UserError names what differs."""
    own = run.config()
    wanted = load(config_name or str(run.path / "config.yaml"), overrides)
    foreign = [key for key in diff(own, wanted) if not _is_free(key)]
    if foreign:
        raise UserError(
            f"{run.path} belongs to another config: {', '.join(foreign)} differ; "
            "leave them as they were, or start a new run without --resume"
        )
    return wanted


def find_unfinished(config: RunConfig) -> Run | None:
    """The newest run of exactly this config that did not finish; None where there is none. One that was stopped did.

    One that is at work counts, too: `begin` then refuses, rather than have a second job begin the same from nothing.
    """
    unfinished = (RUNNING, PREEMPTED, FAILED, KILLED)
    return next(
        (run for run in find_runs(config.runs_dir, config.name) if run.status in unfinished and belongs(run, config)),
        None,
    )


def begin(
    config: RunConfig, resume: Run | None, world_size: int, data_fingerprint: str, say: Callable[[str], None]
) -> Run:
    """Make the run directory, or start another attempt on `resume` or on the unfinished run that `auto` finds.

    The run is locked for this process, in `Run.lock`, before anything in it is changed. Raises UserError, which names
    the other, where another job is working on it.
    """
    place = Path(config.runs_dir) / config.name
    try:
        if resume is not None:
            return _go_on(resume, config, world_size, data_fingerprint, say)
        if config.resume != "auto":
            return _start(config, world_size, data_fingerprint)
        place.mkdir(parents=True, exist_ok=True)
        with locked(place / AUTO_LOCK):  # the same command started twice at once: the second finds the first's run
            found = find_unfinished(config)
            if found is None:
                return _start(config, world_size, data_fingerprint)
        return _go_on(found, config, world_size, data_fingerprint, say)
    except OSError as error:
        where = resume.path if resume is not None else place
        again = f"trainer fit --resume {where}" if resume is not None else "start again, or set runs_dir"
        file = f": {Path(error.filename).name}" if error.filename else ""
        raise TrainerError(
            f"{where} can't be written ({reason(error)}{file}); {remedy(error)}, then: {again}"
        ) from error


def _start(config: RunConfig, world_size: int, data_fingerprint: str) -> Run:
    run = Run.create(config, world_size, data_fingerprint)
    run.lock = acquire(run.path)
    return run


def _go_on(run: Run, config: RunConfig, world_size: int, data_fingerprint: str, say: Callable[[str], None]) -> Run:
    lock = acquire(run.path)
    try:
        record = run.record
        if record["status"] == RUNNING and record["host"] != environment.host():
            wait_for_silence(run.path, say)
        checkpoint.refuse_newer_format(run.checkpoints)
        if record["lineage"]["data"] != lineage({}, None, data_fingerprint, "")["data"]:
            say("warning: the data are not those that this run began with: the epoch goes on in another order")
        run.begin_attempt(world_size)
        if diff(run.config(), config):  # the next attempt goes on as this one, with its train.max_epochs
            write_atomically(run.path / "config.yaml", dump(config).encode())
        failures.clear(run.path)
    except BaseException:
        lock.release()
        raise
    run.lock = lock
    return run


def go_back(run: Run, say: Callable[[str], None]) -> Checkpoint | None:
    """Bring the run directory back to its newest whole checkpoint; None where it has none yet.

    Newer ones, which are damaged, are renamed: they must not count among those to keep. Raises UserError, and changes
    nothing, where there are checkpoints and none is whole.
    """
    found = checkpoint.newest_whole(run.checkpoints, say)
    there = checkpoint.present(run.checkpoints)
    if found is None and there:
        raise UserError(
            f"{run.checkpoints}: none of {len(there)} checkpoints is whole; put a copy back, or start a new run "
            "without --resume"
        )
    step = found.manifest.step if found is not None else 0
    try:
        for path in there:
            if checkpoint.step_of(path) > step:
                say(f"{path.name} is kept as {checkpoint.set_aside(path).name}")
        dropped = run.rewind(step)
    except OSError as error:
        raise TrainerError(
            f"{run.path} can't be written ({reason(error)}); {remedy(error)}, then: trainer fit --resume {run.path}"
        ) from error
    if found is None and dropped:
        say(f"{run.path} has no checkpoint yet: it begins anew")
    return found


def belongs(run: Run, config: RunConfig) -> bool:
    """Whether a run may be gone on with by this config: all that differs is free to."""
    try:
        own = run.config()
    except UserError:
        return False  # written by another version: whatever it was, it was not this config
    return all(_is_free(key) for key in diff(own, config))


def _is_free(key: str) -> bool:
    section, _, rest = key.partition(".")
    return section in FREE or (section == "data" and rest in FREE_DATA)

"""Which run to go on with, whether a config may go on with it, and from where. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trainer import checkpoint, environment, failures
from trainer.checkpoint import Checkpoint
from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.files import write_atomically
from trainer.lineage import lineage
from trainer.load import diff, dump, load
from trainer.run import Run, find_runs

FREE = ("train", "evaluate", "checkpoint", "tracking", "strategy", "resume", "runs_dir")
"""Sections that may change from one attempt to the next: they say how, not what, is learnt."""
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
    """The newest run of exactly this config that did not finish and is not running here; None where there is none.

    One that says it is running on another host counts as killed there: a job that lost its node starts on a new one.
    """
    for run in find_runs(config.runs_dir, config.name):
        status = run.status
        if status == "running" and run.record["host"] != environment.host():
            status = "killed"
        if status in ("preempted", "failed", "killed") and _belongs(run, config):
            return run
    return None


def begin(
    config: RunConfig, resume: Run | None, world_size: int, data_fingerprint: str, say: Callable[[str], None]
) -> Run:
    """Make the run directory, or start another attempt on `resume` or on the unfinished run that `auto` finds."""
    run = resume or (find_unfinished(config) if config.resume == "auto" else None)
    if run is None:
        return Run.create(config, world_size, data_fingerprint)
    if run.record["lineage"]["data"] != lineage({}, None, data_fingerprint, "")["data"]:
        say("warning: the data are not those that this run began with: the epoch goes on in another order")
    run.begin_attempt(world_size)
    if diff(run.config(), config):  # the next attempt goes on as this one, with its train.max_epochs
        write_atomically(run.path / "config.yaml", dump(config).encode())
    failures.clear(run.path)
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
    for path in there:
        if found is not None and path.name > found.path.name:
            say(f"{path.name} is kept as {checkpoint.set_aside(path).name}")
    run.rewind(found.manifest.step if found else 0)
    return found


def _belongs(run: Run, config: RunConfig) -> bool:
    try:
        own = run.config()
    except UserError:
        return False  # written by another version: whatever it was, it was not this config
    return all(_is_free(key) for key in diff(own, config))


def _is_free(key: str) -> bool:
    section, _, rest = key.partition(".")
    return section in FREE or (section == "data" and rest in FREE_DATA)

"""Which run to go on with, and whether a config may go on with it. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.load import diff, load
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
    """The newest run of exactly this config that did not finish and is not running; None where there is none."""
    for run in find_runs(config.runs_dir, config.name):
        if run.status in ("preempted", "failed", "killed") and _belongs(run, config):
            return run
    return None


def _belongs(run: Run, config: RunConfig) -> bool:
    try:
        own = run.config()
    except UserError:
        return False  # written by another version: whatever it was, it was not this config
    return all(_is_free(key) for key in diff(own, config))


def _is_free(key: str) -> bool:
    section, _, rest = key.partition(".")
    return section in FREE or (section == "data" and rest in FREE_DATA)

"""A new run that goes on from another one's checkpoint under a config of its own. No torch."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import checkpoint
from trainer.checkpoint import DamagedCheckpoint
from trainer.errors import TrainerError, UserError
from trainer.files import reason, remedy, remove, sync
from trainer.run import PREEMPTED, Run

if TYPE_CHECKING:
    from trainer.config import RunConfig


def branch(donor: Run, step: int, config: RunConfig, world_size: int, data_fingerprint: str) -> Run:
    """A run of `config` that begins with the checkpoint of `step` of `donor`, and with what was logged up to there.

    Files are shared with the donor (hard links) where the file system can do it: no checkpoint is ever changed in
    place. The record's `source` says where it came from, and is written last: a run that was made by half has none.
    Raises UserError where there is no such checkpoint, TrainerError where it is damaged or can't be written.
    """
    found = _checkpoint(donor, step)
    run = Run.create(config, world_size, data_fingerprint)
    try:
        run.checkpoints.mkdir()
        unfinished = checkpoint.unfinished_folder(run.checkpoints, step)
        shutil.copytree(found.path, unfinished, copy_function=_link)
        os.replace(unfinished, run.checkpoints / found.path.name)
        sync(run.checkpoints)
        for entry in donor.read_metrics():
            if entry.get("step", 0) <= step and not any(key.startswith("test/") for key in entry):
                run.log(entry)
        run.close()
        run.end_attempt(PREEMPTED, f"made from {donor.path}, step {step}")
        run.update(source=source(donor.path, step))
    except OSError as error:
        remove(run.path)
        raise TrainerError(f"{run.path} can't be written ({reason(error)}); {remedy(error)}") from error
    return run


def source(donor: Path, step: int) -> dict[str, Any]:
    """What the record of a run says of its beginning; runs that began from nothing have none."""
    return {"run": str(donor.resolve()), "step": step}


def _checkpoint(donor: Run, step: int) -> checkpoint.Checkpoint:
    path = donor.checkpoints / checkpoint.folder_name(step)
    if not path.is_dir():
        there = ", ".join(str(checkpoint.step_of(one)) for one in checkpoint.present(donor.checkpoints)) or "none"
        raise UserError(f"{donor.path} has no checkpoint of step {step} to go on from; there are: {there}")
    try:
        found = checkpoint.read(path)
        checkpoint.verify(found)
    except DamagedCheckpoint as error:
        raise TrainerError(f"{donor.path}: {error}; there is nothing to go on from") from error
    return found


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
    return target

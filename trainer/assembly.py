"""What a config describes, built: its data and its task."""

from __future__ import annotations

import json
from typing import Any

from trainer.config import RunConfig
from trainer.holdout import hold_out
from trainer.task import Data, Task
from trainer.validation import to_plain

_kept: dict[str, Data] = {}
"""Data sets by what they were built from, see `preload`."""


def preload(config: RunConfig) -> None:
    """Build the data set now and keep it: processes forked from this one train on it without building their own.

    On one thread, since a process whose pool of threads has begun can't be forked.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        data: Data = config.data.build(seed=config.seed)
        _ = data.fingerprint  # some compute it when it is asked for
    finally:
        torch.set_num_threads(threads)
    _kept[_identity(config)] = data


def build_data(config: RunConfig) -> Data:
    """The data set as its own file gives it, or the kept one, with the `val` that `holdout` asks for.

    A recipe may turn it into another (`Task.data`).
    """
    kept = _kept.get(_identity(config))
    data: Data = kept if kept is not None else config.data.build(seed=config.seed)
    return hold_out(data, config.holdout, config.data.name)


def _identity(config: RunConfig) -> str:
    return json.dumps([config.data.name, to_plain(config.data.options), config.seed], sort_keys=True)


def base_of(task: Task) -> str | None:
    """Fingerprint of the weights that the task's model began with; None from scratch."""
    return task.pretrained.fingerprint if task.pretrained is not None else None


def build_task(config: RunConfig, data: Data) -> Task:
    """The recipe's task, on this process's CPU. `init_from` and `adapter` are handed over where they are set."""
    more: dict[str, Any] = {"init_from": config.init_from, "adapter": config.adapter}
    given = {key: value for key, value in more.items() if value is not None}
    task: Task = config.recipe.build(model=config.model, data=data, **given)
    return task

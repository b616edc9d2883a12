"""What a config describes, built: its data and its task."""

from __future__ import annotations

from typing import Any

from trainer.config import RunConfig
from trainer.task import Data, Task


def build_data(config: RunConfig) -> Data:
    """The data set as its own file gives it; a recipe may turn it into another (`Task.data`)."""
    data: Data = config.data.build(seed=config.seed)
    return data


def base_of(task: Task) -> str | None:
    """Fingerprint of the weights that the task's model began with; None from scratch."""
    return task.pretrained.fingerprint if task.pretrained is not None else None


def build_task(config: RunConfig, data: Data) -> Task:
    """The recipe's task, on this process's CPU. `init_from` and `adapter` are handed over where they are set."""
    more: dict[str, Any] = {"init_from": config.init_from, "adapter": config.adapter}
    given = {key: value for key, value in more.items() if value is not None}
    task: Task = config.recipe.build(model=config.model, data=data, **given)
    return task

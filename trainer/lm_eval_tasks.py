"""Tasks of EleutherAI's lm-eval on a run's language model, where that library is installed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError
from trainer.files import write_atomically

if TYPE_CHECKING:
    from trainer.config import RunConfig
    from trainer.run import Run

FILE = "lm_eval.json"
BATCH_SIZE = 8


def evaluate(
    run: Run, config: RunConfig, which: str, tasks: Sequence[str], folder: str | None, say: Callable[[str], None]
) -> dict[str, float]:
    """Metrics as `task/metric`, also written to the run's `artifacts/lm_eval.json`.

    Args:
        which: checkpoint: `best`, `newest` or a step.
        tasks: names that lm-eval knows, or that stand in `folder`.
        folder: of task files (YAML) of one's own.

    Raises UserError without lm-eval, or for a task that it does not know.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--lm-eval: the library lm-eval is not installed: pip install lm-eval")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from trainer.language_model import open_run

    manager = TaskManager(include_path=folder)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UserError(f"--lm-eval: lm-eval has no task {', '.join(unknown)}; its own: lm-eval ls tasks")
    opened = open_run(run, config, which, say)
    model = HFLM(pretrained=opened.model, tokenizer=opened.task.tokenizer, batch_size=BATCH_SIZE)
    found: dict[str, Any] = simple_evaluate(model, tasks=list(tasks), task_manager=manager, log_samples=False)
    values = {
        f"{task}/{name.removesuffix(',none')}": float(value)
        for task, metrics in found["results"].items()
        for name, value in metrics.items()
        if isinstance(value, int | float) and name != "sample_len"
    }
    run.artifacts.mkdir(exist_ok=True)
    record = {"checkpoint": opened.checkpoint.path.name, "metrics": values, "versions": found.get("versions", {})}
    write_atomically(run.artifacts / FILE, json.dumps(record, indent=1).encode())
    return values


def split_names(text: str) -> list[str]:
    """`a,b` as a list. Raises UserError where there is none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError("--lm-eval: name at least one task, e.g. --lm-eval arc_easy")
    return names


def require_folder(folder: str | None) -> None:
    """Raises UserError for a folder that is not there."""
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--lm-eval-tasks: {folder} is no folder")

"""Which step logs, evaluates, saves; the same answer on every rank, the clock aside, which rank 0 reads. No torch."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from trainer.errors import TrainerError

if TYPE_CHECKING:
    from trainer.loop import Job


class Cadence:
    """The rhythm of one training; `begin` is called with each step."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._last_save = time.monotonic()
        self._epoch_before = 0

    def begin(self) -> None:
        """A step begins."""
        self._epoch_before = self._epoch()

    def logs(self, step: int) -> bool:
        return step % self._job.config.train.log_every == 0 or step in (1, self._job.total_steps)

    def time_to_save(self) -> bool:
        minutes = self._job.config.checkpoint.every_minutes
        return (
            minutes is not None
            and self._job.engine.world.is_main
            and time.monotonic() - self._last_save >= 60 * minutes
        )

    def saved(self) -> None:
        self._last_save = time.monotonic()

    def evaluates(self) -> bool:
        when = self._job.config.evaluate
        return self._job.val_set is not None and self._due(when.every_steps, when.every_epochs)

    def saves(self) -> bool:
        when = self._job.config.checkpoint
        return self._due(when.every_steps, when.every_epochs)

    def is_best(self, metrics: dict[str, float]) -> bool:
        """Whether `checkpoint.monitor` is better than ever; notes it if so."""
        rule, progress = self._job.config.checkpoint, self._job.progress
        if not metrics or rule.monitor is None:
            return False
        if rule.monitor not in metrics:
            raise TrainerError(
                f"checkpoint.monitor: no metric {rule.monitor!r}; there are: {', '.join(sorted(metrics))}"
            )
        value, sign = metrics[rule.monitor], 1 if rule.mode == "max" else -1
        if math.isnan(value) or (progress.best is not None and sign * value <= sign * progress.best):
            return False
        progress.best = value
        return True

    def _epoch(self) -> int:
        return self._job.progress.consumed // self._job.plan.num_samples

    def _due(self, every_steps: int | None, every_epochs: int | None) -> bool:
        """Due at the end of training, too."""
        step = self._job.progress.step
        if step == self._job.total_steps or (every_steps and step % every_steps == 0):
            return True
        # The end of an epoch is crossed rather than met where its last step was left out.
        epochs = range(self._epoch_before + 1, self._epoch() + 1)
        return any(epoch % every_epochs == 0 for epoch in epochs) if every_epochs else False

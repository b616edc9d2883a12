"""The training loop. Everything a step does stands here, in its order; each part says who takes part."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

from trainer.config import Loading, RunConfig
from trainer.ema import WeightAverage
from trainer.engine import Engine
from trainer.errors import TrainerError
from trainer.loading import Loaded, load
from trainer.preemption import Preemption
from trainer.report import Report
from trainer.sampling import Plan
from trainer.saving import Saver
from trainer.state import Progress
from trainer.task import Dataset, Task


@dataclass
class Job:
    """What the loop works with, on one rank."""

    config: RunConfig
    engine: Engine
    task: Task
    train_set: Dataset
    val_set: Dataset | None
    plan: Plan
    total_steps: int
    schedule: Callable[[int], float]
    ema: WeightAverage | None
    progress: Progress
    saver: Saver
    report: Report
    preemption: Preemption
    loading: Loading
    eval_loading: Loading


def train(job: Job) -> bool:
    """Train to the end, or to the first wish to stop; True when done, False when stopped with a checkpoint."""
    micros = job.plan.training(job.progress.consumed, job.engine.world.rank)
    with closing(load(job.train_set, micros, job.loading, job.engine.device)) as batches:
        return _train(job, batches)


def _train(job: Job, batches: Iterator[Loaded]) -> bool:
    engine, task, progress, report = job.engine, job.task, job.progress, job.report
    nominal = job.plan.global_batch
    # DDP and FSDP average over ranks; with this factor the sum of all gradients is that of the mean over `nominal`.
    share = engine.world.size / nominal
    cadence = _Cadence(job)
    engine.model.train()
    while progress.step < job.total_steps:
        rate = engine.set_learning_rate(job.schedule(progress.step))
        logs = cadence.logs(progress.step + 1)
        loss, count, bad = 0.0, 0.0, []

        for loaded in _one_step(batches, report):
            # forward: every rank, on its own slice of the global batch
            more_to_come = not loaded.micro.last
            with engine.accumulating(more_to_come):
                with engine.forward_context():
                    part, part_count = task.loss(engine.model, engine.cast(loaded.batch))
                if loaded.filler:
                    part, part_count = part * 0.0, 0.0
                count += part_count
                bad += loaded.batch["bad"]
                if logs:
                    loss += float(part.detach())
                if not more_to_come:
                    wishes = [float(job.preemption.requested), float(cadence.time_to_save()), float(len(bad))]
                    sums = engine.add_up([count, loss, *wishes])
                # backward: every rank; gradients are exchanged in the last one only, while they are computed
                engine.backward(part, share)

        # exchange: all ranks agree on the count of the global batch, and on whether to stop or save
        count, loss, stop, save_now, any_bad = sums.wait()
        if any_bad:
            report.bad_samples("train", [sample for part in engine.gather(bad) for sample in part])
        if logs and not math.isfinite(loss):
            raise TrainerError(
                f"the loss is {loss} at step {progress.step + 1}: lower optimizer.lr or set train.clip_norm"
            )

        # clip and step: every rank; the schedule and the average count optimizer steps and nothing else
        norm = engine.finish_gradients(nominal / count if count else 0.0)
        engine.step()
        progress.step += 1
        report.samples += loaded.micro.consumed - progress.consumed
        progress.consumed = loaded.micro.consumed
        if job.ema is not None:
            job.ema.update(progress.step)

        # log: rank 0
        if logs:
            report.step(progress, loss / count if count else 0.0, rate, norm)
        # evaluate: every rank, each sample of the split once
        metrics = report.evaluate(job) if cadence.evaluates(progress) else {}
        is_best = cadence.is_best(metrics)
        # save: every rank copies its share, the writing goes on beside the next steps
        if save_now or stop or is_best or cadence.saves(progress):
            report.save(job, metrics)
            cadence.saved()
        if stop and progress.step < job.total_steps:
            return False
    return True


def _one_step(batches: Iterator[Loaded], report: Report) -> Iterator[Loaded]:
    """The micro-batches of one optimizer step; the time spent waiting for them is noted."""
    while True:
        before = time.perf_counter()
        loaded = next(batches)
        report.waited += time.perf_counter() - before
        yield loaded
        if loaded.micro.last:
            return


class _Cadence:
    """Which step logs, evaluates, saves; the same answer on every rank, the clock aside, which rank 0 reads."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._last_save = time.monotonic()

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

    def evaluates(self, progress: Progress) -> bool:
        when = self._job.config.evaluate
        return self._job.val_set is not None and self._due(progress, when.every_steps, when.every_epochs)

    def saves(self, progress: Progress) -> bool:
        when = self._job.config.checkpoint
        return self._due(progress, when.every_steps, when.every_epochs)

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

    def _due(self, progress: Progress, every_steps: int | None, every_epochs: int | None) -> bool:
        """Due at the end of training, too."""
        if progress.step == self._job.total_steps or (every_steps and progress.step % every_steps == 0):
            return True
        epoch, into_epoch = divmod(progress.consumed, self._job.plan.num_samples)
        return bool(every_epochs) and into_epoch == 0 and epoch % (every_epochs or 1) == 0

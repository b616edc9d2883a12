"""The training loop. Everything a step does stands here, in its order; each part says who takes part."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

from trainer.cadence import Cadence
from trainer.config import Loading, RunConfig
from trainer.ema import WeightAverage
from trainer.engine import Engine, Pending
from trainer.health import Heartbeat
from trainer.loading import Loaded, load
from trainer.non_finite import Guard, RollBack, Seen
from trainer.preemption import Preemption
from trainer.report import Report
from trainer.run import FINISHED, PREEMPTED, STOPPED
from trainer.sampling import Length, Plan
from trainer.saving import Saver
from trainer.state import Progress
from trainer.stragglers import Stragglers
from trainer.task import Dataset, Task
from trainer.verdict import ENDS, Verdict


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
    heart: Heartbeat
    guard: Guard
    stragglers: Stragglers
    loading: Loading
    eval_loading: Loading
    go_back: Callable[[], Progress]
    """Puts the newest whole checkpoint into the engine; all ranks call it."""
    judge: Callable[[Progress, dict[str, float]], Verdict] = lambda progress, metrics: Verdict.CONTINUE
    """Called on every rank after an evaluation of `val`, with its metrics by full name; rank 0's answer counts."""
    judged: Verdict = Verdict.CONTINUE
    """Of the evaluation before the first step, where the run goes on from one; the same on every rank."""

    def length(self) -> Length:
        """How many steps the training has, as far as is known by now."""
        progress = self.progress
        return self.plan.length(progress.step, progress.consumed, self.config.train, self.guard.left_out)


def train(job: Job) -> str:
    """Train to the end, or to the first wish to stop; the status that the run ends with.

    FINISHED when done, PREEMPTED when there is a checkpoint to go on from, STOPPED when it was judged to end.
    """
    if job.judged in ENDS:
        return STOPPED
    if job.config.train.non_finite == "rollback" and job.progress.step == 0:
        job.report.save(job, {})  # so that there is something to go back to
    while True:
        job.total_steps = job.length().steps
        micros = job.plan.training(job.progress.consumed, job.engine.world.rank, job.guard.left_out)
        try:
            with closing(load(job.train_set, micros, job.loading, job.engine.device)) as batches:
                return _train(job, batches)
        except RollBack as why:
            job.saver.wait()
            vars(job.progress).update(vars(job.go_back()))
            job.report.tell(f"warning: {why}; back at step {job.progress.step}, and those samples are left out")


def _train(job: Job, batches: Iterator[Loaded]) -> str:
    engine, progress, report, beat = job.engine, job.progress, job.report, job.heart.beat
    cadence = Cadence(job)
    job.guard.checkpoint_step = progress.step
    engine.model.train()
    while progress.step < job.total_steps:
        job.heart.step = progress.step
        cadence.begin()
        rate = engine.set_learning_rate(job.schedule(progress.step))
        logs = cadence.logs(progress.step + 1)
        # data, forward, backward: every rank, on its own slice of the global batch
        seen, sums = _gradients(job, batches, cadence, logs)

        # exchange: all ranks agree on the count of the global batch, and on whether to stop or save
        beat("exchange")
        count, loss, tokens, stop, save_now, any_bad, *times = sums.wait()
        if any_bad:
            report.bad_samples("train", [sample for part in engine.gather(seen.bad) for sample in part])

        # clip and step: every rank; the schedule and the average count optimizer steps and nothing else
        beat("step")
        norm = engine.finish_gradients(job.plan.global_batch / count if count else 0.0)
        is_good = math.isfinite(loss) and (math.isfinite(norm) or engine.scales_loss)
        if is_good:
            job.guard.passed()
            engine.step()
        else:
            engine.skip_step()
            job.guard.found(progress, loss, norm, seen)
        progress.step += 1
        consumed = seen.micros[-1].consumed
        report.samples += consumed - progress.consumed
        report.tokens += int(tokens)
        progress.consumed = consumed
        if job.ema is not None and is_good:
            job.ema.update(progress.step)

        # log: rank 0
        if logs:
            beat("log")
            report.step(job, loss / count if count else 0.0, rate, norm, times)
        # evaluate: every rank, each sample of the split once; judge: rank 0 for all
        is_due = cadence.evaluates()
        metrics = report.evaluate(job) if is_due else {}
        verdict = engine.from_main(job.judge(progress, metrics)) if is_due else Verdict.CONTINUE
        if verdict in ENDS and progress.step < job.total_steps:
            return STOPPED
        is_best = cadence.is_best(metrics)
        # save: every rank copies its share, the writing goes on beside the next steps
        job.saver.check()
        stop = stop or verdict == Verdict.PAUSE
        if save_now or stop or is_best or cadence.saves() or verdict == Verdict.SAVE:
            report.save(job, metrics)
            cadence.saved()
        if stop and progress.step < job.total_steps:
            return PREEMPTED
    return FINISHED


def _gradients(job: Job, batches: Iterator[Loaded], cadence: Cadence, logs: bool) -> tuple[Seen, Pending]:
    """The micro-batches of one step, forward and backward: what was seen, and sums on their way around the ranks."""
    engine, beat = job.engine, job.heart.beat
    # DDP and FSDP average over ranks; with this factor the sum of all gradients is that of the mean over the nominal
    # global batch.
    share = engine.world.size / job.plan.global_batch
    loss, count, seen, began = 0.0, 0.0, Seen(), time.perf_counter()
    for loaded in _one_step(batches, job.report, beat):
        # forward: every rank, on its own slice of the global batch
        beat("forward")
        more_to_come = not loaded.micro.last
        with engine.accumulating(more_to_come):
            with engine.forward_context():
                part, part_count = job.task.loss(engine.model, engine.cast(loaded.batch))
            if loaded.filler:
                part, part_count = part * 0.0, 0.0
            seen.add(loaded.micro, part, loaded.batch)
            count += part_count
            if logs or engine.reads_freely:
                loss += float(part.detach())
            if not more_to_come:
                job.stragglers.note(time.perf_counter() - began)
                wishes = [float(job.preemption.requested), float(cadence.time_to_save()), float(len(seen.bad))]
                sums = engine.add_up([count, loss, seen.tokens, *wishes, *(job.stragglers.share() if logs else ())])
            # backward: every rank; gradients are exchanged in the last one only, while they are computed
            beat("backward")
            engine.backward(part, share)
    return seen, sums


def _one_step(batches: Iterator[Loaded], report: Report, beat: Callable[[str], None]) -> Iterator[Loaded]:
    """The micro-batches of one optimizer step; the time spent waiting for them is noted."""
    while True:
        beat("data")
        before = time.perf_counter()
        loaded = next(batches)
        report.waited += time.perf_counter() - before
        yield loaded
        if loaded.micro.last:
            return

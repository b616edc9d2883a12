"""What a training tells: metrics, evaluations, checkpoints and bad samples, to the run directory and the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer import checkpoint, state
from trainer.errors import TrainerError, UserError
from trainer.evaluation import evaluate
from trainer.files import append_line, complete_lines, reason, remedy
from trainer.progress import Progress as Display
from trainer.run import Run
from trainer.task import Dataset, Metrics

if TYPE_CHECKING:
    from trainer.loop import Job

BAD_SAMPLES = "bad_samples.jsonl"


@dataclass
class Report:
    """One per rank; `run` and `display` only on rank 0."""

    run: Run | None
    display: Display | None
    samples_per_epoch: int
    max_bad_samples: int
    samples: int = 0
    """Samples trained on by the whole job in this attempt."""
    tokens: int = 0
    """Of text, padding not counted, trained on by the whole job in this attempt; 0 where the data are none."""
    waited: float = 0.0
    """Seconds this rank waited for data."""
    aside: float = 0.0
    """Seconds spent in evaluation and in the stalls of saving."""
    final: Metrics | None = None
    """Of `val` after the last step."""
    bad: set[tuple[str, int]] = field(default_factory=set)
    """Split and index of the samples that could not be read."""
    _started: float = field(default_factory=time.perf_counter)
    _marks: tuple[float, int, int, float] = (0.0, 0, 0, 0.0)

    def training_seconds(self) -> float:
        """Of this attempt, evaluation and saving left out."""
        return time.perf_counter() - self._started - self.aside

    def step(self, job: Job, loss: float, rate: float, norm: float, times: Sequence[float]) -> None:
        """Log one step; speeds are those since the last logged step, `times` see `Stragglers`."""
        if self.run is None:
            return
        progress = job.progress
        if times and (told := job.stragglers.judge(times)) is not None:
            self.tell(told)
        seconds, samples, tokens, waited = self.training_seconds(), self.samples, self.tokens, self.waited
        last_seconds, last_samples, last_tokens, last_waited = self._marks
        self._marks = (seconds, samples, tokens, waited)
        elapsed = max(seconds - last_seconds, 1e-9)
        entry = {
            **self._when(progress),
            "train/loss": loss,
            "lr": rate,
            "grad_norm": norm,
            "samples_per_second": (samples - last_samples) / elapsed,
            **({"tokens": tokens, "tokens_per_second": (tokens - last_tokens) / elapsed} if tokens else {}),
            "data_wait": (waited - last_waited) / elapsed,
            "memory_gb": peak_memory_gb(),
            **(job.stragglers.figures if times else {}),
        }
        self.run.log(entry)
        if self.display is not None:
            self.display.update(progress.step, entry["epoch"], entry)

    def tell(self, text: str) -> None:
        """A line for the user, above the display."""
        if self.display is not None:
            self.display.message(text)

    def log(self, progress: state.Progress, metrics: dict[str, float]) -> None:
        """Log an evaluation and show it."""
        if self.run is not None:
            self.run.log({**self._when(progress), **metrics})
        if self.display is not None:
            self.display.evaluation(progress.step, metrics)

    def evaluate(self, job: Job) -> dict[str, float]:
        """Evaluate the `val` split; returns the metrics by full name, `val/accuracy`, on every rank."""
        assert job.val_set is not None
        metrics = self.evaluate_split(job, "val", job.val_set)
        if job.progress.step == job.total_steps:
            self.final = metrics
            self.picture(job, "val", metrics)
        return {f"val/{name}": value for name, value in metrics.compute().items()}

    def evaluate_split(self, job: Job, split: str, dataset: Dataset) -> Metrics:
        """Evaluate a split, and log and show its metrics; every rank calls it."""
        before = time.perf_counter()
        beat = partial(job.heart.beat, "evaluate" if split == "val" else split)
        beat()
        result = evaluate(job.engine, job.task, dataset, job.eval_loading, job.ema, beat)
        self.bad_samples(split, result.bad)
        self.log(job.progress, {f"{split}/{name}": value for name, value in result.metrics.compute().items()})
        self.aside += time.perf_counter() - before
        return result.metrics

    def picture(self, job: Job, place: str, metrics: Metrics) -> None:
        """Pictures and tables of an evaluation, into `artifacts/<place>/`, where `evaluate.pictures` wants them."""
        if self.run is not None and job.config.evaluate.pictures:
            write_pictures(self.run, place, metrics)

    def save(self, job: Job, metrics: dict[str, float]) -> None:
        """Hand the job's state to the saver; every rank calls it."""
        before = time.perf_counter()
        job.heart.beat("save")
        snapshot = state.capture(job.engine, job.ema, job.progress)
        progress = job.progress
        manifest = checkpoint.Manifest(
            progress.step,
            progress.consumed,
            job.engine.world.size,
            job.engine.sharded,
            dict(metrics),
            batch_size=job.plan.batch_size,
            accumulate=job.plan.accumulate,
            global_batch=job.plan.global_batch,
        )
        job.saver.save(snapshot, manifest)
        job.guard.checkpoint_step = progress.step
        self.aside += time.perf_counter() - before

    def bad_samples(self, split: str, samples: list[tuple[int, str]]) -> None:
        """List unreadable samples once each; a UserError, on every rank alike, when there are too many."""
        for index, why in samples:
            if (split, index) in self.bad:
                continue
            self.bad.add((split, index))
            if self.run is not None:
                append_line(self.run.path / BAD_SAMPLES, {"split": split, "index": index, "reason": why})
        if len(self.bad) > self.max_bad_samples:
            where = f"; they are listed in {self.run.path / BAD_SAMPLES}" if self.run else ""
            last = samples[-1][1]
            raise UserError(
                f"{len(self.bad)} samples can't be read and data.max_bad_samples is {self.max_bad_samples}: "
                f"{last}{where}"
            )

    def summary(self) -> dict[str, float]:
        """Speed of this attempt as a whole, evaluation and saving left out."""
        seconds = max(self.training_seconds(), 1e-9)
        speed = {"samples_per_second": self.samples / seconds, "tokens_per_second": self.tokens / seconds}
        return {**speed, "data_wait": self.waited / seconds}

    def _when(self, progress: state.Progress) -> dict[str, Any]:
        return {
            "step": progress.step,
            "epoch": round(progress.consumed / self.samples_per_epoch, 4),
            "time": round(time.time(), 3),
        }


def known_bad_samples(folder: Path) -> set[tuple[str, int]]:
    """Samples that earlier attempts of the run listed: they count against the limit, and are not listed again."""
    return {(entry["split"], entry["index"]) for entry in complete_lines(folder / BAD_SAMPLES)}


def write_pictures(run: Run, place: str, metrics: Any) -> None:
    """Let the metrics write their pictures and tables into `artifacts/<place>/`, e.g. `val`."""
    folder = run.artifacts / place
    try:
        folder.mkdir(parents=True, exist_ok=True)
        metrics.write(folder)
    except OSError as error:
        raise TrainerError(
            f"{folder} could not be written ({reason(error)}); {remedy(error)}, then: trainer fit --resume {run.path}"
        ) from error


def peak_memory_gb() -> float:
    """Highest memory so far: of the accelerator's allocator, else of this process; GB (10^9 bytes)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

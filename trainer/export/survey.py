"""One pass over the split: the run's own evaluation beside what each program makes of the same samples' requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving import inputs
from serving.errors import BadInput
from serving.inputs import Arrays, Sample
from serving.predictor import Predictor, deviation_of, stack
from trainer.errors import TrainerError
from trainer.export.opened import Opened
from trainer.task import Batch, Metrics


class Witness(Protocol):
    """Sees every batch."""

    def see(
        self, batch: Batch, answers: Sequence[Tensor], arrays: list[NDArray[Any]], samples: Sequence[Sample]
    ) -> None:
        """`samples` are the requests as parsed, `arrays` the program's inputs as made of them; `answers`, the
        evaluation's."""
        ...


class Agreement:
    """How far a program is from the run's own answers."""

    def __init__(self, predictor: Predictor, metrics: Metrics | None, measure: Callable[..., None] | None) -> None:
        self._predictor = predictor
        self._measure = measure
        self._metrics = metrics if measure is not None else None
        self._has_labels = predictor.bundle.postprocessing["kind"] == "classification"
        self.deviation = 0.0
        self.samples = 0
        self._flipped: list[float] = []

    def see(
        self, batch: Batch, answers: Sequence[Tensor], arrays: list[NDArray[Any]], samples: Sequence[Sample]
    ) -> None:
        """Run the program, and compare."""
        found = self._predictor.run_batch(arrays)
        self.samples += len(arrays[0])
        for ours, wanted in zip(found, answers, strict=True):
            self.deviation = max(self.deviation, worst_if_nan(deviation_of(ours, wanted.numpy())))
        if self._has_labels:
            ours, scores = np.asarray(found[0]), answers[0].numpy()
            two = np.sort(scores, axis=1)[:, -2:]
            other = ours.argmax(1) != scores.argmax(1)
            self._flipped += (two[other, -1] - two[other, 0]).tolist()
        if self._metrics is not None and self._measure is not None:
            self._measure([torch.from_numpy(np.asarray(part)) for part in found], batch, self._metrics)

    def metrics(self) -> dict[str, float]:
        """The split's metrics by this program's answers; empty where the task does not say how they are measured."""
        return self._metrics.compute() if self._metrics is not None else {}

    def other_labels(self) -> int:
        """Samples with another best label than the run's."""
        return len(self._flipped)

    def wrong_labels(self, tolerance: float) -> int:
        """Those whose two best scores are further apart than `tolerance` at both could explain."""
        return sum(margin > 2 * tolerance for margin in self._flipped)


def survey(opened: Opened, witnesses: Sequence[Witness], most: int | None) -> tuple[dict[str, float], int]:
    """Show every sample (or `most` of them, evenly) to the witnesses; (the evaluation's metrics, samples seen).

    Raises TrainerError for a sample that the evaluation takes and the server would not.
    """
    total = len(opened.dataset)
    chosen = np.arange(total) if most is None else np.unique(np.linspace(0, total - 1, most).astype(int))
    taking = inputs.load(opened.servable.preprocessing, opened.servable.signature)
    metrics = opened.task.metrics(opened.engine.device)
    seen = 0
    for start in range(0, len(chosen), opened.batch_size):
        batch, kept = opened.batch(chosen[start : start + opened.batch_size].tolist())
        if not kept:
            continue
        answers = opened.answers(batch)
        with torch.no_grad(), opened.engine.forward_context():
            opened.task.evaluate(opened.engine.bare, opened.engine.cast(batch), metrics)
        samples, arrays = _prepared(opened, taking, kept)
        host = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in batch.items()}
        for witness in witnesses:
            witness.see(host, answers, arrays, samples)
        seen += len(kept)
    return metrics.compute(), seen


def _prepared(opened: Opened, taking: inputs.Input, indices: list[int]) -> tuple[list[Sample], list[NDArray[Any]]]:
    samples: list[Sample] = []
    rows: list[Arrays] = []
    for index in indices:
        request = opened.servable.request(opened.split, index)
        try:
            samples.append(taking.parse(request, f"sample {index}"))
            rows.append(taking.prepare(samples[-1]))
        except BadInput as error:
            raise TrainerError(f"{opened.split}: evaluation takes it, the server would not: {error}") from error
    return samples, [stack(parts) for parts in zip(*rows, strict=True)]


def worst_if_nan(value: float) -> float:
    """Infinity for NaN, which no comparison would show."""
    return float("inf") if value != value else value

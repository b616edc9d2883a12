"""Accuracy, top-5 accuracy, macro F1, loss and the confusion matrix, exact over batches and ranks."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from trainer.task import Metrics

TOP = 5


class ClassificationMetrics(Metrics):
    """Sums of one evaluation of single-label classification.

    `compute` gives `loss` (mean cross-entropy, without smoothing or class weights), `accuracy`, `macro_f1` (mean over
    the classes that occur as a label or as a prediction, as scikit-learn's `f1_score(average="macro",
    zero_division=0)`) and, for more than five classes, `accuracy_top5`; nothing where there was no sample.
    """

    def __init__(self, class_names: Sequence[str], device: torch.device) -> None:
        self.class_names = tuple(class_names)
        num_classes = len(self.class_names)
        # MPS has no float64.
        loss_type = torch.float32 if device.type == "mps" else torch.float64
        self.sums = {
            "loss": torch.zeros((), dtype=loss_type, device=device),
            "confusion": torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device),
        }
        if num_classes > TOP:
            self.sums["top5"] = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits [N, num_classes], labels [N] int64."""
        logits = logits.float()
        self.sums["loss"] += F.cross_entropy(logits, labels, reduction="sum")
        cells = labels * len(self.class_names) + logits.argmax(1)
        self.sums["confusion"].scatter_add_(0, cells, torch.ones_like(cells))
        if "top5" in self.sums:
            self.sums["top5"] += (logits.topk(TOP, dim=1).indices == labels[:, None]).sum()

    @property
    def confusion(self) -> NDArray[np.int64]:
        """[num_classes, num_classes] counts; rows are labels, columns predictions."""
        num_classes = len(self.class_names)
        return self.sums["confusion"].reshape(num_classes, num_classes).cpu().numpy()

    def compute(self) -> dict[str, float]:
        confusion = self.confusion
        count = int(confusion.sum())
        if not count:
            return {}
        f1, occurs = f1_by_class(confusion)
        values = {
            "loss": float(self.sums["loss"]) / count,
            "accuracy": int(np.trace(confusion)) / count,
            "macro_f1": float(f1[occurs].mean()),
        }
        if "top5" in self.sums:
            values["accuracy_top5"] = int(self.sums["top5"]) / count
        return values

    def write(self, folder: Path) -> list[Path]:
        """`confusion_matrix.png`, `confusion_matrix.csv` and `classes.csv` (precision, recall, F1 of each class)."""
        from recipes.metrics.confusion_figure import draw_confusion

        confusion = self.confusion
        if not confusion.sum():
            return []
        figure, matrix, classes = (
            folder / "confusion_matrix.png",
            folder / "confusion_matrix.csv",
            folder / "classes.csv",
        )
        draw_confusion(confusion, self.class_names, figure)
        rows = ([name, *counts] for name, counts in zip(self.class_names, confusion.tolist(), strict=True))
        _write_csv(matrix, ["label \\ prediction", *self.class_names], rows)
        _write_csv(classes, ["index", "class", "samples", "predicted", "precision", "recall", "f1"], self._class_rows())
        return [figure, matrix, classes]

    def _class_rows(self) -> Iterable[list[Any]]:
        confusion = self.confusion
        hits, samples, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
        f1, _ = f1_by_class(confusion)
        for index, name in enumerate(self.class_names):
            precision = hits[index] / max(predicted[index], 1)
            recall = hits[index] / max(samples[index], 1)
            scores = [f"{value:.6f}" for value in (precision, recall, f1[index])]
            yield [index, name, samples[index], predicted[index], *scores]


def f1_by_class(confusion: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """F1 of each class, 0 where it is undefined, and whether the class occurs as a label or as a prediction."""
    total = confusion.sum(0) + confusion.sum(1)
    return 2 * np.diag(confusion) / np.maximum(total, 1), total > 0


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)

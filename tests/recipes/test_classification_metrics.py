from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from recipes.metrics.classification import ClassificationMetrics

CPU = torch.device("cpu")


def sample(num_classes: int, num: int, seed: int, skip: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are right about half of the time, and labels; class `skip` never occurs."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, (num,), generator=generator)
    logits = torch.randn(num, num_classes, generator=generator)
    logits[torch.arange(num), labels] += 1.5
    if skip is not None:
        labels[labels == skip] = (skip + 1) % num_classes
        logits[:, skip] = -100
    return logits, labels


def measure(logits: torch.Tensor, labels: torch.Tensor, sizes: list[int], num_classes: int) -> ClassificationMetrics:
    metrics = ClassificationMetrics([f"class {i}" for i in range(num_classes)], CPU)
    for part, part_labels in zip(logits.split(sizes), labels.split(sizes), strict=True):
        metrics.update(part, part_labels)
    return metrics


@pytest.mark.parametrize(("num_classes", "num", "skip"), [(2, 50, None), (5, 200, None), (10, 400, 3), (200, 500, 0)])
def test_values_are_those_of_scikit_learn_and_torchmetrics(num_classes: int, num: int, skip: int | None) -> None:
    logits, labels = sample(num_classes, num, seed=num_classes, skip=skip)
    metrics = measure(logits, labels, [num // 2, num - num // 2], num_classes)
    values = metrics.compute()
    predicted = logits.argmax(1)

    assert values["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert values["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0))
    expected = multiclass_f1_score(logits, labels, num_classes, average="macro")
    assert values["macro_f1"] == pytest.approx(float(expected), rel=1e-5)
    assert values["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    if num_classes > 5:
        top5 = multiclass_accuracy(logits, labels, num_classes, average="micro", top_k=5)
        assert values["accuracy_top5"] == pytest.approx(float(top5))
    else:
        assert "accuracy_top5" not in values
    assert np.array_equal(metrics.confusion, confusion_matrix(labels, predicted, labels=range(num_classes)))


def test_sums_add_over_ranks() -> None:
    logits, labels = sample(10, 101, seed=4)
    whole = measure(logits, labels, [101], 10)
    ranks = [measure(logits[r::3], labels[r::3], [len(labels[r::3])], 10) for r in range(3)]
    ranks[0].sums = {name: sum(rank.sums[name] for rank in ranks) for name in ranks[0].sums}
    assert ranks[0].compute() == pytest.approx(whole.compute())


def test_without_samples_there_are_no_values(tmp_path: Path) -> None:
    metrics = ClassificationMetrics(["a", "b"], CPU)
    assert metrics.compute() == {}
    assert metrics.write(tmp_path) == []


def read_csv(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_tables(tmp_path: Path) -> None:
    names = ["plain", "with, comma", 'with "quotes"', "$dollar$", "größe", "f"]
    logits, labels = sample(6, 300, seed=1)
    metrics = ClassificationMetrics(names, CPU)
    metrics.update(logits, labels)
    files = metrics.write(tmp_path)
    assert sorted(path.name for path in files) == ["classes.csv", "confusion_matrix.csv", "confusion_matrix.png"]

    predicted = logits.argmax(1)
    header, *rows = read_csv(tmp_path / "confusion_matrix.csv")
    assert header[1:] == names and [row[0] for row in rows] == names
    assert [[int(cell) for cell in row[1:]] for row in rows] == confusion_matrix(labels, predicted).tolist()

    _, *rows = read_csv(tmp_path / "classes.csv")
    precision, recall, f1, support = precision_recall_fscore_support(labels, predicted, zero_division=0)
    assert [row[1] for row in rows] == names
    assert [int(row[2]) for row in rows] == support.tolist()
    np.testing.assert_allclose([[float(x) for x in row[4:]] for row in rows], np.c_[precision, recall, f1], atol=1e-6)


@pytest.mark.parametrize("num_classes", [1, 10, 45, 1000])
def test_figure_is_large_enough_for_its_classes(num_classes: int, tmp_path: Path) -> None:
    logits, labels = sample(num_classes, 2000, seed=2)
    measure(logits, labels, [2000], num_classes).write(tmp_path)
    with Image.open(tmp_path / "confusion_matrix.png") as figure:
        assert min(figure.size) >= min(max(500, num_classes), 1200)
        pixels = np.asarray(figure.convert("L"))
    assert pixels.min() < 100 < 250 < pixels.max()

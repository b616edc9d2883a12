"""Loss, perplexity and accuracy from sums per document, and their intervals against scipy's bootstrap."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import bootstrap

from recipes.metrics.language import LanguageMetrics, differences, intervals, read, values

CPU = torch.device("cpu")


def table(size: int, seed: int = 0) -> NDArray[np.float64]:
    """[documents, 3] with long documents that are harder than short ones."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(1, 60, size).astype(np.float64)
    losses = tokens * (1.5 + 0.01 * tokens + 0.3 * draw.standard_normal(size)).clip(0.1)
    return np.stack([losses, draw.binomial(tokens.astype(int), 0.6).astype(np.float64), tokens], 1)


def filled(size: int, rows: NDArray[np.int64], losses: NDArray[np.float64]) -> LanguageMetrics:
    metrics = LanguageMetrics(size, CPU)
    metrics.update(torch.from_numpy(rows), torch.from_numpy(losses).float(), torch.from_numpy(losses < 1))
    return metrics


def test_values_are_sums_over_tokens_and_ranks_add_up() -> None:
    draw = np.random.default_rng(0)
    rows, losses = draw.integers(0, 9, 200), draw.exponential(size=200).astype(np.float32).astype(np.float64)
    whole = filled(9, rows, losses)
    found = whole.compute()
    assert found["loss"] == pytest.approx(losses.mean(), rel=1e-12)
    assert found["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-12)
    assert found["token_accuracy"] == pytest.approx((losses < 1).mean(), rel=1e-12)
    ranks = [filled(9, rows[part], losses[part]) for part in (slice(0, 77), slice(77, 77), slice(77, 200))]
    added = sum(rank.sums["documents"] for rank in ranks)
    torch.testing.assert_close(added, whole.sums["documents"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [12, 300])
def test_intervals_are_those_of_scipy(size: int) -> None:
    data = table(size)
    found = intervals(data)
    statistics = {"loss": 0, "token_accuracy": 1}
    for name, column in statistics.items():
        wanted = bootstrap(
            (data[:, column], data[:, 2]),
            lambda part, tokens, axis=-1: part.sum(axis) / tokens.sum(axis),
            paired=True,
            vectorized=True,
            n_resamples=20_000,
            method="percentile",
            rng=np.random.default_rng(1),
        )
        value, low, high = found[name]
        assert value == pytest.approx(data[:, column].sum() / data[:, 2].sum())
        # The ends of 2,000 draws scatter by about 0.06 of the standard error; four times that
        near = 0.25 * wanted.standard_error
        assert [low, high] == pytest.approx(list(wanted.confidence_interval), abs=near), name
    assert found["perplexity"][1:] == pytest.approx([math.exp(end) for end in found["loss"][1:]], rel=1e-3)


def test_a_change_of_the_same_documents_is_sharper_than_the_two_intervals() -> None:
    before = table(200)
    after = before.copy()
    after[:, 0] *= 0.98 + 0.01 * np.random.default_rng(3).standard_normal(200)
    (loss, perplexity, accuracy) = differences(before, after)
    assert loss.before[1] < loss.after[0] < loss.before[0] < loss.after[2], "the intervals overlap"
    assert loss.change[0] == pytest.approx(loss.after[0] - loss.before[0])
    assert loss.change[1] < loss.change[0] < loss.change[2] < 0
    apart = math.hypot(loss.before[2] - loss.before[1], loss.after[2] - loss.after[1])
    assert loss.change[2] - loss.change[1] < apart / 4
    assert perplexity.change[2] < 0 and accuracy.change == (0, 0, 0)


def test_what_was_written_is_compared_document_by_document(tmp_path: Path) -> None:
    first = filled(6, np.array([0, 0, 2, 4, 5]), np.array([1.0, 2.0, 0.5, 3.0, 1.0]))
    first.write(tmp_path)
    np.testing.assert_array_equal(read(tmp_path), first.sums["documents"].numpy())
    second = filled(6, np.array([0, 0, 2, 3, 4]), np.array([0.5, 1.0, 0.5, 9.0, 2.0]))  # 3 and 5 are in one only
    loss = second.compare(tmp_path)[0]
    assert loss.before[0] == pytest.approx(6.5 / 4) and loss.after[0] == pytest.approx(4 / 4)


def test_one_document_has_an_interval_without_width() -> None:
    found = intervals(table(1))
    assert all(low == pytest.approx(value) == high for value, low, high in found.values())


@pytest.mark.parametrize("size", [0, 3])
@pytest.mark.filterwarnings("error")
def test_without_a_token_there_are_no_numbers(size: int, tmp_path: Path) -> None:
    metrics = LanguageMetrics(size, CPU)
    assert all(math.isnan(value) for value in metrics.compute().values())
    assert all(math.isnan(end) for ends in intervals(np.zeros((size, 3))).values() for end in ends)
    metrics.write(tmp_path)
    assert read(tmp_path).shape == (0, 3)
    assert all(math.isnan(row.change[0]) for row in metrics.compare(tmp_path))


def test_a_hopeless_loss_is_no_overflow() -> None:
    assert math.isfinite(values(np.array([[1e6, 0.0, 10.0]]))["perplexity"])

"""Whether repeats tell the best from the others: held against scipy, and against cases that have an answer."""

from __future__ import annotations

import json
import math
import random

import pytest
from scipy import stats

from trainer.search.confirm import HEAD, compare, holm


@pytest.mark.parametrize("seed", range(20))
def test_paired_tests_are_those_of_scipy(seed: int) -> None:
    rng = random.Random(seed)
    num, k = rng.randint(2, 8), rng.randint(2, 5)
    repeats = {trial: [rng.gauss(0.9 + 0.01 * trial, 0.02) for _ in range(num)] for trial in range(k)}
    found = compare(repeats, "max")
    means = {trial: sum(values) / num for trial, values in repeats.items()}
    assert [item.trial for item in found.trials] == sorted(means, key=lambda trial: -means[trial])
    assert found.trials[0].std == pytest.approx(stats.tstd(repeats[found.best]))
    expected = [stats.ttest_rel(repeats[found.best], repeats[item.trial]).pvalue for item in found.comparisons]
    assert [item.p for item in found.comparisons] == pytest.approx(expected)
    assert {item.test for item in found.comparisons} == {"paired t-test"}
    # Holm as Wikipedia has it: p of rank r times the number of hypotheses not smaller, made monotonous
    order = sorted(range(k - 1), key=lambda place: expected[place])
    adjusted = [0.0] * (k - 1)
    for rank, place in enumerate(order):
        adjusted[place] = max(min(1, (k - 1 - j) * expected[order[j]]) for j in range(rank + 1))
    assert [item.p_adjusted for item in found.comparisons] == pytest.approx(adjusted)
    assert [item.is_told_apart for item in found.comparisons] == [p < 0.05 for p in adjusted]


@pytest.mark.parametrize("seed", range(10))
def test_unequal_counts_are_compared_by_welch(seed: int) -> None:
    rng = random.Random(seed)
    repeats = {3: [rng.gauss(0.2, 0.1) for _ in range(6)], 8: [rng.gauss(0.5, 0.3) for _ in range(3)]}
    found = compare(repeats, "min")
    other = found.comparisons[0]
    assert other.test == "Welch's t-test"
    expected = stats.ttest_ind(repeats[found.best], repeats[other.trial], equal_var=False).pvalue
    assert other.p == pytest.approx(expected) and other.p_adjusted == pytest.approx(expected)


def test_shared_seeds_tell_what_the_spread_hides() -> None:
    spread = [0.70, 0.80, 0.90, 0.85]
    found = compare({1: spread, 2: [value - 0.01 + 0.001 * (place % 2) for place, value in enumerate(spread)]}, "max")
    assert found.best == 1 and found.tied == []
    assert found.conclusion() == "trial 1 is better than the others, at 5%"
    assert stats.ttest_ind(spread, [value - 0.01 for value in spread]).pvalue > 0.5


def test_what_cannot_be_told_apart_is_said() -> None:
    found = compare({1: [0.9, 0.8, 0.85], 2: [0.81, 0.88, 0.84], 3: [0.1, 0.11, 0.09]}, "max")
    assert found.best == 1 and found.tied == [2]
    assert found.conclusion() == "trial 1 has the best mean, but can't be told apart from 2 at 5%"
    rows = found.rows()
    assert all(len(row) == len(HEAD) for row in rows)
    assert rows[0] == ("1", "0.8500", "0.0500", "3", "best mean")
    assert rows[1][4].startswith("can't be told apart (p = ") and rows[2][4].startswith("worse by 0.7500 (p ")
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["tied"] == [2]


def test_one_seed_tells_nothing() -> None:
    found = compare({1: [0.9], 2: [0.1]}, "max")
    assert found.tied == [2] and math.isnan(found.comparisons[0].p) and not found.comparisons[0].is_told_apart
    assert "one seed tells nothing" in found.conclusion()
    assert found.rows()[1] == ("2", "0.1000", "-", "1", "can't be told apart (fewer than two seeds)")
    assert found.as_dict()["comparisons"][0]["p"] is None


def test_repeats_that_failed_are_left_out_pair_by_pair() -> None:
    best, other = [0.9, math.nan, 0.8, 0.85], [0.5, 0.6, math.nan, 0.52]
    found = compare({1: best, 2: other, 3: [math.nan] * 4}, "max")
    assert [item.trial for item in found.trials] == [1, 2, 3] and found.trials[1].values == (0.5, 0.6, 0.52)
    expected = stats.ttest_rel([0.9, 0.85], [0.5, 0.52]).pvalue
    assert found.comparisons[0].p == pytest.approx(expected) and found.comparisons[1].test == "none"
    assert found.rows()[2][1:4] == ("-", "-", "0")
    assert compare({5: [math.nan]}, "max").conclusion() == "no repeat has ended: nothing can be told"


def test_values_without_any_spread() -> None:
    same = compare({1: [0.5, 0.5, 0.5], 2: [0.5, 0.5, 0.5]}, "max")
    assert same.best == 1 and same.tied == [2] and same.comparisons[0].p == 1.0
    apart = compare({1: [0.5, 0.5], 2: [0.25, 0.25]}, "max")
    assert apart.tied == [] and apart.comparisons[0].p == 0.0
    alone = compare({4: [0.5, 0.6]}, "min")
    assert alone.conclusion() == "trial 4 was the only one that was repeated" and alone.comparisons == ()


def test_holm_leaves_out_what_is_no_number() -> None:
    assert holm([0.01, math.nan, 0.04]) == pytest.approx([0.02, math.nan, 0.04], nan_ok=True)
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]

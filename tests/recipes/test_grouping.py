"""Groups of documents: each exactly once, within the budget, the same everywhere, and nearly full."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.language.grouping import Layout, group, padded_size

BUDGET = 64
lengths_lists = st.lists(st.integers(1, BUDGET), max_size=200)


@given(lengths=lengths_lists, layout=st.sampled_from(["packed", "padded"]), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=200, deadline=None)
def test_every_document_once_within_the_budget_and_the_same_again(
    lengths: list[int], layout: Layout, seed: int
) -> None:
    array = np.array(lengths, np.int64)
    groups = group(array, BUDGET, layout, seed)
    assert sorted(groups.members.tolist()) == list(range(len(lengths)))
    assert groups.starts[0] == 0 and groups.starts[-1] == len(lengths) and (np.diff(groups.starts) > 0).all()
    for number in range(len(groups)):
        held = array[groups.documents(number)]
        assert (held.sum() if layout == "packed" else held.max() * len(held)) <= BUDGET
    again = group(array, BUDGET, layout, seed)
    assert np.array_equal(groups.members, again.members) and np.array_equal(groups.starts, again.starts)


@given(lengths=lengths_lists)
@settings(max_examples=100, deadline=None)
def test_packing_is_best_fit_by_the_book(lengths: list[int]) -> None:
    """As many groups as the plain algorithm, one document and a scan of all groups at a time."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(room, index) for index, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting)[1]] -= length
        else:
            rooms.append(BUDGET - length)
    assert len(group(np.array(lengths, np.int64), BUDGET, "packed", 0)) == len(rooms)


def test_a_million_documents_take_seconds_and_leave_no_room() -> None:
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(5.5, 0.9, 1_000_000), 1, 2048).astype(np.int64)
    started = time.process_time()
    packed = group(lengths, 2048, "packed", 0)
    padded = group(lengths, 2048, "padded", 0)
    assert time.process_time() - started < 30  # 1.6 s where nothing else runs; quadratic work would take hours
    assert lengths.sum() / (len(packed) * 2048) > 0.999
    assert lengths.sum() / padded_size(padded, lengths) > 0.999
    assert np.bincount(packed.members, minlength=len(lengths)).max() == 1


def test_rows_of_a_padded_group_are_of_near_equal_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 5_000)
    groups = group(lengths, 1024, "padded", 0)
    held = [lengths[groups.documents(number)] for number in range(len(groups))]
    assert np.mean([each.max() - each.min() for each in held]) < 5


def test_the_seed_decides_who_comes_together() -> None:
    lengths = np.full(100, 16)
    first, second = (group(lengths, 64, "packed", seed) for seed in (0, 1))
    assert not np.array_equal(first.members, second.members)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_none_one_and_one_that_is_longer(layout: Layout) -> None:
    assert len(group(np.empty(0, np.int64), 8, layout, 0)) == 0
    assert group(np.array([8]), 8, layout, 0).documents(0).tolist() == [0]
    if layout == "padded":
        assert len(group(np.array([9, 3, 3]), 8, layout, 0)) == 2
    else:
        with pytest.raises(AssertionError):
            group(np.array([9]), 8, layout, 0)

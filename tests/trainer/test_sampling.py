"""The order of the data: any epoch, cut in any way, is each sample once."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import Train
from trainer.sampling import Length, MicroBatch, Plan, epoch_order, split


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    return Plan(
        num_samples=draw(st.integers(1, 120)),
        batch_size=draw(st.integers(1, 40)),
        world_size=draw(st.integers(1, 9)),
        accumulate=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 2**63 - 1)),
        drop_last=draw(st.booleans()),
    )


def steps_of(
    plan: Plan, rank: int, consumed: int, count: int, left_out: Collection[int] = ()
) -> list[list[MicroBatch]]:
    """The micro-batches of `count` optimizer steps of a rank."""
    steps: list[list[MicroBatch]] = [[]]
    for micro in plan.training(consumed, rank, left_out):
        steps[-1].append(micro)
        if micro.last:
            if len(steps) == count:
                return steps
            steps.append([])
    raise AssertionError("training ended")


def drop_is_possible(plan: Plan) -> bool:
    return plan.drop_last and plan.num_samples >= plan.global_batch


@settings(max_examples=150, deadline=None)
@given(plans(), st.integers(0, 3))
def test_the_ranks_together_cover_each_epoch_once_and_in_step(plan: Plan, epoch: int) -> None:
    start = epoch * plan.num_samples
    count = max(1, plan.steps_per_epoch)
    ranks = [steps_of(plan, rank, start, count) for rank in range(plan.world_size)]
    seen: list[int] = []
    consumed = start
    for step in zip(*ranks, strict=True):
        assert len({len(micros) for micros in step}) == 1  # as many forward passes on every rank
        after = plan.after(consumed)
        in_step: list[int] = []
        for micros in zip(*step, strict=True):
            own = [micro.indices for micro in micros if not micro.filler]
            in_step += [index for indices in own for index in indices]
            sizes = [len(micro.indices) if not micro.filler else 0 for micro in micros]
            assert max(sizes) <= plan.batch_size and max(sizes) - min(sizes) <= 1
            assert sizes == sorted(sizes, reverse=True)
            assert all(len(micro.indices) == 1 for micro in micros if micro.filler)
            if any(micro.filler for micro in micros):  # only where there were not enough samples to go round
                assert sum(sizes) < plan.world_size
            assert {micro.epoch for micro in micros} == {epoch}
            assert {micro.consumed for micro in micros} == {after}
        assert [micro.last for micro in step[0]] == [False] * (len(step[0]) - 1) + [True]
        assert len(step[0]) <= plan.accumulate and 0 < len(in_step) <= plan.global_batch
        seen += in_step
        consumed = after
    order = epoch_order(plan.num_samples, plan.seed, epoch)
    kept = plan.steps_per_epoch * plan.global_batch if drop_is_possible(plan) else plan.num_samples
    assert seen == order[:kept].tolist()
    assert consumed == start + plan.num_samples


@settings(max_examples=150, deadline=None)
@given(st.data(), plans(), st.integers(1, 4))
def test_steps_left_and_after_agree_with_what_training_yields_from_anywhere(
    data: st.DataObject, plan: Plan, max_epochs: int
) -> None:
    # Any number of consumed samples is reachable: a resume may bring another batch size.
    consumed = data.draw(st.integers(0, max_epochs * plan.num_samples - 1))
    left = plan.steps_left(consumed, max_epochs)
    if drop_is_possible(plan) or not plan.drop_last:
        count, position = 0, consumed
        while position < max_epochs * plan.num_samples:
            position = plan.after(position)
            count += 1
        assert left == count and position == max_epochs * plan.num_samples
        steps = steps_of(plan, 0, consumed, count)
        assert steps[-1][-1].consumed == max_epochs * plan.num_samples
        assert {micro.epoch for step in steps for micro in step} <= set(range(max_epochs))
    assert plan.steps_left(max_epochs * plan.num_samples, max_epochs) == 0
    assert plan.steps_left(max_epochs * plan.num_samples + consumed, max_epochs) == 0


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 100), st.integers(0, 100))
def test_a_run_that_changes_its_world_and_batch_on_the_way_sees_each_sample_once(
    data: st.DataObject, num_samples: int, seed: int
) -> None:
    consumed, seen = 0, []
    while consumed < num_samples:
        sizes = st.integers(1, 7)
        plan = Plan(num_samples, data.draw(sizes), data.draw(sizes), data.draw(st.integers(1, 3)), seed)
        for rank in range(plan.world_size):
            (step,) = steps_of(plan, rank, consumed, 1)
            seen += [index for micro in step if not micro.filler for index in micro.indices]
        consumed = plan.after(consumed)
    assert sorted(seen) == list(range(num_samples))


@settings(max_examples=100, deadline=None)
@given(plans(), st.integers(0, 12))
def test_a_stream_can_be_taken_up_at_any_step(plan: Plan, skipped: int) -> None:
    whole = steps_of(plan, 0, 0, skipped + 4)
    assert steps_of(plan, 0, whole[skipped][-1].consumed, 3) == whole[skipped + 1 :]


@settings(max_examples=100, deadline=None)
@given(plans())
def test_the_global_batch_does_not_depend_on_how_it_is_cut(plan: Plan) -> None:
    alone = Plan(plan.num_samples, plan.global_batch, seed=plan.seed, drop_last=plan.drop_last)
    ranks = [steps_of(plan, rank, 0, 4) for rank in range(plan.world_size)]
    for whole, *parts in zip(steps_of(alone, 0, 0, 4), *ranks, strict=True):
        mine = [index for step in parts for micro in step if not micro.filler for index in micro.indices]
        assert sorted(mine) == sorted(index for micro in whole for index in micro.indices)


@settings(max_examples=100, deadline=None)
@given(plans())
def test_evaluation_covers_the_data_set_once_whatever_the_world(plan: Plan) -> None:
    ranks = [list(plan.evaluation(rank)) for rank in range(plan.world_size)]
    assert len({len(micros) for micros in ranks}) == 1
    indices = [index for micros in ranks for micro in micros if not micro.filler for index in micro.indices]
    assert sorted(indices) == list(range(plan.num_samples))


def test_the_order_is_a_permutation_that_depends_on_seed_and_epoch_only() -> None:
    orders = [epoch_order(1000, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1, 2)]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    epoch_order.cache_clear()
    assert epoch_order(1000, 0, 0).tolist() == orders[0]
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(1000, 0, 0)[0] = 1


def test_the_order_of_a_seed_never_changes() -> None:
    # A checkpoint of an older version must go on with the same samples.
    assert epoch_order(10, 42, 3).tolist() == [4, 3, 7, 2, 5, 1, 9, 8, 0, 6]


def test_one_sample_and_more_ranks_than_samples() -> None:
    plan = Plan(1, 1, world_size=1)
    assert [(m.epoch, m.indices, m.last, m.consumed) for m in islice(plan.training(0, 0), 2)] == [
        (0, (0,), True, 1),
        (1, (0,), True, 2),
    ]
    for rank in range(4):
        (step,) = steps_of(Plan(2, 1, world_size=4), rank, 0, 1)
        assert [micro.filler for micro in step] == [rank >= 2] and len(step[0].indices) == 1


def test_a_slice_goes_to_the_lower_ranks_first() -> None:
    chunk = np.arange(100, 107)
    assert [split(chunk, 2, 2, rank) for rank in (0, 1)] == [
        [((100, 101), False), ((104, 105), False)],
        [((102, 103), False), ((106,), False)],
    ]


def test_drop_last_after_a_larger_batch_finishes_the_epoch() -> None:
    plan = Plan(100, 30, drop_last=True)
    assert plan.steps_per_epoch == 3 and plan.after(60) == 100
    assert plan.after(80) == 100  # fewer than a batch left by a smaller one: they are not dropped
    assert plan.steps_left(80, 1) == 1 and plan.steps_left(0, 2) == 6


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_a_kept_global_batch_is_cut_into_as_many_micro_batches_as_it_takes(world_size: int) -> None:
    plan = Plan(103, 8, world_size, accumulate=1, seed=3, kept_global_batch=32)
    wanted = Plan(103, 32, seed=3)
    assert (plan.global_batch, plan.steps_per_epoch) == (32, wanted.steps_per_epoch)
    ranks = [steps_of(plan, rank, 0, 8) for rank in range(world_size)]
    for number, step in enumerate(steps_of(wanted, 0, 0, 8)):
        mine = [micro for rank in ranks for micro in rank[number]]
        assert sorted(i for micro in mine if not micro.filler for i in micro.indices) == sorted(step[0].indices)
        assert len({len(rank[number]) for rank in ranks}) == 1
        assert all(len(micro.indices) <= 8 and micro.consumed == step[0].consumed for micro in mine)


def test_steps_that_are_left_out_are_passed_over_and_counted() -> None:
    plan = Plan(100, 10, seed=1)
    left_out = {0, 30, 40, 90, 110}
    steps = steps_of(plan, 0, 0, 15, left_out)
    whole = {step[0].consumed - 10: step[0].indices for step in steps_of(plan, 0, 0, 20)}
    taken = [start for start in sorted(whole) if start not in left_out]
    assert [step[0].indices for step in steps] == [whole[start] for start in taken]
    # What comes before one that is left out ends behind it: at the end of the epoch, for one.
    assert [step[0].consumed for step in steps][:7] == [20, 50, 60, 70, 80, 100, 120]

    limits = Train(max_epochs=2)
    assert plan.length(0, 0, limits, left_out) == Length(15, 20)
    assert plan.length(5, 80, limits, left_out) == Length(15, 20)
    assert plan.length(0, 0, limits) == Length(20, 20)
    assert plan.length(7, 120, Train(max_epochs=2, max_steps=9), left_out) == Length(9, 9)
    assert plan.length(0, 0, Train(max_steps=7), left_out) == Length(7, 7)

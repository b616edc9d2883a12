"""Every sample once per epoch, whatever the number of ranks, the batch and the place where it is taken up again."""

from __future__ import annotations

from itertools import islice

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.sampling import MicroBatch, Plan, epoch_order


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    num_samples = draw(st.integers(1, 60))
    plan = Plan(
        num_samples,
        batch_size=draw(st.integers(1, 9)),
        world_size=draw(st.integers(1, 5)),
        accumulate=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 5)),
        drop_last=draw(st.booleans()),
    )
    return plan if plan.global_batch <= num_samples else Plan(num_samples, 1, min(num_samples, plan.world_size))


def steps(plan: Plan, consumed: int, rank: int, count: int) -> list[list[MicroBatch]]:
    """The first `count` optimizer steps of one rank."""
    found: list[list[MicroBatch]] = [[]]
    for micro in plan.training(consumed, rank):
        found[-1].append(micro)
        if micro.last:
            if len(found) == count:
                return found
            found.append([])
    raise AssertionError("the stream has no end")


@given(plans(), st.integers(1, 3))
def test_an_epoch_has_each_sample_once(plan: Plan, epochs: int) -> None:
    count = plan.steps_left(0, epochs)
    assert count == epochs * plan.steps_per_epoch
    ranks = [steps(plan, 0, rank, count) for rank in range(plan.world_size)]
    seen: dict[int, list[int]] = {}
    for step in zip(*ranks, strict=True):
        assert len({len(micros) for micros in step}) == 1, "ranks must agree on the number of micro-batches"
        assert len({micros[-1].consumed for micros in step}) == 1
        for micros in step:
            for micro in micros:
                assert 1 <= len(micro.indices) <= plan.batch_size
                if not micro.filler:
                    seen.setdefault(micro.epoch, []).extend(micro.indices)
    assert sorted(seen) == list(range(epochs))
    for indices in seen.values():
        assert len(set(indices)) == len(indices)
        expected = plan.steps_per_epoch * plan.global_batch if plan.drop_last else plan.num_samples
        assert len(indices) == min(expected, plan.num_samples)
    assert ranks[0][-1][-1].consumed == epochs * plan.num_samples, "an epoch counts as the whole data set"


@given(plans(), plans(), st.integers(0, 7))
def test_another_world_goes_on_with_the_samples_that_are_left(before: Plan, after: Plan, done: int) -> None:
    after = Plan(before.num_samples, after.batch_size, after.world_size, after.accumulate, before.seed)
    before = Plan(before.num_samples, before.batch_size, before.world_size, before.accumulate, before.seed)
    done = min(done, before.steps_per_epoch - 1)
    if done == 0:
        return
    first = [m for rank in range(before.world_size) for micros in steps(before, 0, rank, done) for m in micros]
    consumed = max(m.consumed for m in first)
    left = after.steps_left(consumed, 1)
    second = [m for rank in range(after.world_size) for micros in steps(after, consumed, rank, left) for m in micros]
    seen = [index for m in first + second if not m.filler for index in m.indices]
    assert sorted(seen) == list(range(before.num_samples))


@given(plans(), st.integers(0, 40))
def test_a_stream_can_be_taken_up_at_any_step(plan: Plan, skipped: int) -> None:
    whole = list(islice(plan.training(0, 0), 60))
    ends = [m.consumed for m in whole if m.last]
    consumed = ends[min(skipped, len(ends) - 2)]
    rest = whole[[m.consumed for m in whole].index(consumed) + sum(m.consumed == consumed for m in whole) :]
    assert list(islice(plan.training(consumed, 0), len(rest))) == rest


@given(plans())
def test_the_global_batch_does_not_depend_on_how_it_is_cut(plan: Plan) -> None:
    alone = Plan(plan.num_samples, plan.global_batch, seed=plan.seed, drop_last=plan.drop_last)
    count = min(5, plan.steps_left(0, 2))
    ranks = [steps(plan, 0, rank, count) for rank in range(plan.world_size)]
    for whole, *parts in zip(steps(alone, 0, 0, count), *ranks, strict=True):
        mine = [i for micros in parts for m in micros if not m.filler for i in m.indices]
        assert sorted(mine) == sorted(i for m in whole for i in m.indices)


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 9))
def test_evaluation_has_each_sample_once_and_ranks_keep_step(num_samples: int, batch_size: int, world: int) -> None:
    plan = Plan(num_samples, batch_size, world)
    ranks = [list(plan.evaluation(rank)) for rank in range(world)]
    assert len({len(micros) for micros in ranks}) == 1
    seen = [i for micros in ranks for m in micros if not m.filler for i in m.indices]
    assert sorted(seen) == list(range(num_samples))


def test_order_is_a_permutation_of_its_own_for_each_seed_and_epoch() -> None:
    orders = {(seed, epoch): tuple(epoch_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(set(orders.values())) == 4
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert np.array_equal(epoch_order(50, 1, 1), orders[1, 1])


def test_more_ranks_than_samples_leave_fillers() -> None:
    plan = Plan(3, 1, world_size=3)
    assert [m.filler for rank in range(3) for m in islice(plan.training(0, rank), 1)] == [False] * 3
    tail = [next(iter(Plan(2, 1, world_size=3).evaluation(rank))) for rank in range(3)]
    assert [(m.indices, m.filler) for m in tail] == [((0,), False), ((1,), False), ((0,), True)]

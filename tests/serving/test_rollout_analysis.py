"""The analysis in simulated rollouts: how often a good version is sent back, and how soon a bad one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from rollout_worlds import End, World, roll
from soak import choose

from serving.rollout.plan import Plan, Step

PLAN = choose(
    Plan(steps=(Step(10.0, 5.0, 200), Step(50.0, 5.0, 300), Step(100.0, 2.0, 100))),
    Plan(steps=(Step(10.0, 30.0, 500), Step(50.0, 10.0, 1000), Step(100.0, 2.0, 500))),
)


def false_rollbacks(world: World, rollouts: int, plan: Plan = PLAN) -> list[End]:
    return [end for seed in range(rollouts) if (end := roll(plan, world, seed)).decision.action == "rollback"]


def told(survived: Callable[[str], None], what: str, ends: list[End]) -> None:
    new = np.quantile([end.new_requests for end in ends], [0.5, 0.9]).astype(int)
    every = np.quantile([end.requests for end in ends], [0.5, 0.9]).astype(int)
    text = f"{what}: sent back after {new[0]} requests to the new version (median; 90 %: {new[1]}), {every[0]} in all"
    print(text)
    survived(text)


EQUAL = {
    "bursts": World(errors_old=0.005, errors_new=0.005, bursts=True, spread=1.0),
    "half-a-percent": World(errors_old=0.005, errors_new=0.005),
    "no-errors": World(),
}


@pytest.mark.soak
@pytest.mark.parametrize("kind", choose(["bursts"], [*EQUAL]))
def test_an_equal_version_is_sent_back_in_one_rollout_of_a_hundred_at_most(
    kind: str, survived: Callable[[str], None]
) -> None:
    rollouts = choose(200, 2000)
    sent_back = false_rollbacks(EQUAL[kind], rollouts)
    survived(f"{len(sent_back)} of {rollouts} equal versions sent back ({kind})")
    assert len(sent_back) <= 0.01 * rollouts, [end.decision.reason for end in sent_back]


def test_an_equal_version_is_promoted() -> None:
    ends = [roll(PLAN, World(errors_old=0.002, errors_new=0.002), seed) for seed in range(10)]
    assert {end.decision.action for end in ends} == {"promote"}


@pytest.mark.soak
def test_five_percent_errors_are_sent_back_within_200_requests(survived: Callable[[str], None]) -> None:
    ends = [roll(PLAN, World(errors_new=0.05), seed) for seed in range(choose(100, 1000))]
    told(survived, "5 % errors against none", ends)
    assert {end.decision.action for end in ends} == {"rollback"}
    within = np.mean([end.new_requests <= 200 for end in ends])
    survived(f"within 200 requests: {within:.1%}")
    assert within >= 0.95


@pytest.mark.soak
def test_thirty_percent_slower_is_sent_back_within_1000_requests(survived: Callable[[str], None]) -> None:
    held = Plan(steps=(Step(10.0, 0.0, 1500), Step(50.0, 0.0, 1500)))
    ends = [roll(held, World(slower=1.3), seed) for seed in range(choose(25, 500))]
    told(survived, "30 % slower", ends)
    within = np.mean([end.decision.action == "rollback" and end.new_requests <= 1000 for end in ends])
    survived(f"within 1,000 requests: {within:.1%}")
    assert within >= 0.95


def test_a_version_within_the_margins_is_not_sent_back() -> None:
    """8 % slower where 10 % are allowed; 0.05 % more errors where 0.1 % are."""
    world = World(slower=1.08, errors_old=0.001, errors_new=0.0015)
    assert not false_rollbacks(world, 15)


def test_a_limit_that_the_old_version_breaks_too_does_not_send_the_new_one_back() -> None:
    ends = [roll(PLAN, World(errors_old=0.04, errors_new=0.04), seed, longest=4096) for seed in range(4)]
    assert {end.decision.action for end in ends} == {"hold"}
    assert any("may fare no better" in end.decision.reason for end in ends)


def test_no_worse_is_waited_for_where_the_plan_asks_for_it() -> None:
    steps = (Step(50.0, 1.0, 200),)
    eager = roll(Plan(steps=steps), World(), 1)
    asked = roll(Plan(steps=steps, non_inferior=True), World(), 1)
    assert eager.decision.action == asked.decision.action == "promote"
    assert asked.new_requests > 2 * eager.new_requests
    assert "within the margins" in asked.decision.reason

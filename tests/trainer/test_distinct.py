"""TPE over a space of few combinations: nothing is trained twice while there is something new."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.component import Component, default
from trainer.search.space import read_space
from trainer.search.study import Study
from trainer.search.trial import FAILED, FINISHED, PRUNED


def study(raw: dict[str, Any], directions: tuple[Any, ...] = ("max",), **options: Any) -> Study:
    tpe = default("sampler", "tpe")
    return Study(read_space(raw), directions, Component("sampler", "tpe", {**tpe.options, "startup": 4, **options}), 0)


def proposals(asked: Study, count: int) -> list[dict[str, Any]]:
    """Trials one after the other; the smaller the sum of the numbers, the better; the states take turns."""
    found = []
    for number in range(count):
        params = asked.ask(number).params
        value = -sum(value for value in params.values() if isinstance(value, int | float))
        asked.report(number, 1, value)
        state = (FINISHED, PRUNED, FAILED)[number % 3]
        asked.tell(number, (value,) if state == FINISHED else None, state)
        found.append(params)
    return found


def num_different(found: list[dict[str, Any]]) -> int:
    return len({tuple(sorted(params.items())) for params in found})


GRID = {"a": {"int": [0, 4]}, "b": {"choice": ["x", "y"]}, "c": {"quantized": [0.1, 0.5, 0.1]}}


def test_new_combinations_as_long_as_there_are_some() -> None:
    found = proposals(study(GRID), 46)
    startup, modelled = found[:6], found[6:]  # four that have not failed
    assert num_different(modelled) == len(modelled)
    assert not {tuple(params.items()) for params in startup} & {tuple(params.items()) for params in modelled}


def test_repeats_are_taken_if_wanted() -> None:
    assert num_different(proposals(study(GRID, repeats=True), 46)) < 40


def test_a_space_that_is_used_up_goes_on() -> None:
    found = proposals(study({"a": {"int": [0, 1]}, "b": {"choice": ["x", "y"]}}), 12)
    assert num_different(found) == 4


def test_what_runs_is_not_proposed_again() -> None:
    asked = study(GRID)
    proposals(asked, 8)
    running = [asked.ask(number).params for number in range(8, 28)]
    assert num_different(running) == 20


@pytest.mark.parametrize("group", [True, False])
def test_conditions(group: bool) -> None:
    raw = {"a": {"choice": ["x", "y"]}, "b": {"int": [0, 5]}, "c": {"int": [0, 5], "when": {"a": "x"}}}
    found = proposals(study(raw, group=group), 30)
    assert all(("c" in params) == (params["a"] == "x") for params in found)
    if group:  # the parameters of all groups are proposed before the first of them is taken
        assert num_different(found[8:]) == len(found) - 8


def test_a_continuous_space_and_several_objectives_have_plain_tpe() -> None:
    continuous = study({"a": {"uniform": [0.0, 1.0]}})
    assert num_different(proposals(continuous, 12)) == 12
    two = study(GRID, ("max", "min"))
    for number in range(12):
        params = two.ask(number).params
        two.tell(number, (params["a"], params["c"]), FINISHED)
    assert len(two.optuna_study.trials) == 12


def test_a_proposal_follows_from_seed_and_trials() -> None:
    assert proposals(study(GRID), 30) == proposals(study(GRID), 30)

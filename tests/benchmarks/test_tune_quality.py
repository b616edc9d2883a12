"""The replay of searches on the shipped table: what its figures rest on."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
SLOTS = 4


@pytest.fixture(scope="module")
def house() -> Iterator[Any]:
    """The benchmark's modules, which import each other as programs of that folder do."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from workloads import number_pickles, our_search, regrets, replay, searches, tables

        yield SimpleNamespace(
            **{
                **vars(number_pickles),
                **vars(tables),
                **vars(searches),
                **vars(our_search),
                **vars(regrets),
                **vars(replay),
            }
        )
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ("workloads", "harness"):
                del sys.modules[name]


@pytest.fixture(scope="module")
def table(house: Any) -> Any:
    return house.digits_curves("accuracy")


def test_the_shipped_table_is_whole(house: Any, table: Any) -> None:
    combinations = np.prod([len(values) for values in table.grid.values()])
    assert table.values.shape == (2, combinations, 50) and table.seconds.shape == (2, combinations)
    assert (table.seconds > 0).all() and (table.values >= 0).all() and (table.values <= 100).all()
    assert table.regret(0).min() == 0 and table.regret(1).max() > 50
    loss = house.digits_curves("loss")
    # Two readings of the same trainings: who is among the best by one is far better than chance by the other.
    best = np.argsort(table.regret(0))[:40]
    assert np.median(loss.regret(0)[best]) < np.quantile(loss.regret(0), 0.2)


def test_a_point_of_the_space_is_a_row(table: Any) -> None:
    first = {key: values[0] if isinstance(values[0], str) else 0 for key, values in table.grid.items()}
    last = {key: values[-1] if isinstance(values[0], str) else len(values) - 1 for key, values in table.grid.items()}
    assert table.combination(first) == 0
    assert table.combination({**first, "dropout": 1}) == 1  # the last parameter runs fastest
    assert table.combination(last) == table.values.shape[1] - 1


@pytest.mark.parametrize("contender", ["random", "tpe", "ray", "ours"])
def test_replays_are_functions_of_the_seed_and_keep_to_the_budget(house: Any, table: Any, contender: str) -> None:
    make = {
        "random": lambda seed: house.RandomSearch(table, seed),
        "tpe": lambda seed: house.RaySearch(table, seed, None),
        "ray": lambda seed: house.RaySearch(table, seed, house.asha_settings()),
        "ours": lambda seed: house.OurSearch(table, seed, "asha"),
    }[contender]
    budget = 5.0
    found = [house.replay(make(seed), table, seed, SLOTS, budget) for seed in (0, 1)]
    for replayed in found:
        assert (np.diff(replayed.regret) < 0).all() and (np.diff(replayed.spent) > 0).all()
        assert budget <= replayed.total < budget + table.seconds.max()
        assert replayed.full <= replayed.trials
        assert np.isnan(replayed.at(0.0)) and replayed.at(budget) == replayed.regret[-1]
    again = house.replay(make(1), table, 1, SLOTS, budget)
    assert np.array_equal(again.spent, found[1].spent) and np.array_equal(again.regret, found[1].regret)
    assert not np.array_equal(found[0].spent, found[1].spent)
    if contender in ("ray", "ours"):
        assert found[0].full < found[0].trials / 2
    else:
        assert found[0].trials - found[0].full <= SLOTS


def test_without_a_budget_a_number_of_trials_ends_a_replay(house: Any, table: Any) -> None:
    replayed = house.replay(house.RandomSearch(table, 3), table, 3, SLOTS, max_trials=6)
    assert (replayed.trials, replayed.full) == (6, 6)


def test_all_may_begin_with_the_same_points(house: Any, table: Any) -> None:
    first = house.first_points(table, 5, 10)
    asha = house.asha_settings()
    for method in (
        house.OurSearch(table, 5, "asha"),
        house.RaySearch(table, 5, asha, first),
        house.RaySearch(table, 5, None, first),
        house.RandomSearch(table, 5, first),
    ):
        assert [method.next()[1] for _ in range(10)] == first
        assert table.combination(method.next()[1]) < table.values.shape[1]


def test_the_same_settings_of_asha_in_both(house: Any, table: Any) -> None:
    ours = house.OurSearch(table, 0, "asha")
    ours.next()
    ray = house.RaySearch(table, 0, house.asha_settings()).scheduler
    mine = ours.search._ledger.pacing._ray
    assert [rung for rung, _ in mine._brackets[0]._rungs] == [rung for rung, _ in ray._brackets[0]._rungs]
    assert (mine._max_t, mine._reduction_factor) == (ray._max_t, ray._reduction_factor)
    assert (mine._stop_last_trials, mine._mode) == (ray._stop_last_trials, ray._mode)


def test_what_the_two_searches_tell_of_a_stopped_trial(house: Any, table: Any) -> None:
    """Ray Tune calls it complete, with its last value; ours calls it pruned, with its curve."""
    budget = 3.0
    ray, ours = house.RaySearch(table, 0, house.asha_settings()), house.OurSearch(table, 0, "asha")
    fed = house.replay(ray, table, 0, SLOTS, budget)
    house.replay(ours, table, 0, SLOTS, budget)
    states = [trial.state.name for trial in ray.searcher._ot_study.trials]
    assert states.count("COMPLETE") > fed.full and "PRUNED" not in states
    study = ours.search.optuna_study
    pruned = [trial for trial in study.trials if trial.state.name == "PRUNED"]
    assert pruned and all(trial.intermediate_values for trial in pruned)
    complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    assert all(len(trial.intermediate_values) == table.iterations for trial in complete)


def test_an_incumbent_is_of_the_highest_iteration_and_worth_its_last(house: Any) -> None:
    """Trial 0 looks worse early and ends better; trial 1 is stopped after one iteration with the better value."""
    values = np.array([[[10.0, 20.0], [15.0, 16.0], [0.0, 30.0]]])
    table = house.Table("small", {"x": [0, 1, 2]}, values, np.array([[1.0, 2.0, 1.0]]), "max", "points")

    class Two:
        def __init__(self) -> None:
            self.waiting = [1, 0]

        def next(self) -> tuple[int, dict[str, int]] | None:
            return (number := self.waiting.pop(), {"x": number}) if self.waiting else None

        def report(self, number: int, iteration: int, value: float, seconds: float) -> bool:
            assert value == values[0, number, iteration - 1] and seconds == iteration * table.seconds[0, number]
            return number == 0

    replayed = house.replay(Two(), table, 0, slots=2)
    # Reports: 0 after 1 s; 0 and 1 after 2 s, in the order of their start: 1 is better at iteration 1 and never counts
    # again once 0 has reached iteration 2.
    assert replayed.spent.tolist() == [1.0] and replayed.regret.tolist() == [10.0]
    assert (replayed.total, replayed.trials, replayed.full) == (4.0, 2, 1)


def test_speeds_and_differences(house: Any) -> None:
    steps = np.linspace(1, 0, house.POINTS)
    reference = np.tile(steps, (6, 1))
    twice_as_fast = np.tile(np.maximum(0, 1 - 2 * (1 - steps)), (6, 1))
    found = house.speed(twice_as_fast, reference)
    assert found.share == pytest.approx(0.5, abs=0.01) and found.low == found.share == found.high
    assert house.speed(reference, reference).share == 1.0
    assert house.speed(reference + 1, reference).share == float("inf")
    row = house.Row("case", "points", {"ours": np.array([1.0, 2.0, 3.0]), "peer": np.array([2.0, 3.0, 5.0])})
    mean, low, high = row.difference("peer")
    assert mean == pytest.approx(-4 / 3) and -2 <= low <= mean <= high <= -1
    assert row.as_json()["ours"] == 2.0 and row.as_json()["peers"] == {"peer": 3.0}


def test_number_pickles_are_followed_and_programs_refused(house: Any, tmp_path: Path) -> None:
    plain = {"00": {"acc": [0.5, 0.25], "time": [1.0, 2.0]}, "01": {"acc": [0.125, 1.0], "time": [3.0, 4.0]}}
    file = tmp_path / "plain.pkl"
    file.write_bytes(pickle.dumps(plain, protocol=4))
    assert house.read_numbers(file) == plain
    file.write_bytes(pickle.dumps(print, protocol=4))
    with pytest.raises(ValueError, match=r"plain\.pkl: instruction STACK_GLOBAL at byte \d+ is not one of plain data"):
        house.read_numbers(file)

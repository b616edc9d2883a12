"""A search that is cut after any event and built again from its journal goes on as the uninterrupted one."""

from __future__ import annotations

from typing import Any

import pytest
from searching import COUNTABLE, METRIC, MIXED, NUMBERS, curve, goes_on_alike, recorded, search_config

from trainer.search.trial import FINISHED, PRUNED, Report, Trial

FAULTS: dict[str, Any] = {"fail": 0.02, "lose": 0.05, "interrupt": 0.05}


def known_trials() -> tuple[Trial, ...]:
    reports = [Report(1, 10, 1.0, {METRIC: 0.3}, 1.0), Report(2, 20, 2.0, {METRIC: 0.5}, 2.0)]
    finished = Trial(5, {"optimizer.lr": 0.01, "optimizer.momentum": 0.5}, FINISHED, reports, (0.5,), origin="tune-1")
    pruned = Trial(6, {"optimizer.lr": 0.002, "optimizer.momentum": 0.1}, PRUNED, reports[:1], (0.3,), origin="tune-1")
    return finished, pruned


@pytest.mark.parametrize("scheduler", ["none", "asha", "median", "hyperband", "pbt"])
@pytest.mark.parametrize("space", [NUMBERS, MIXED], ids=["numbers", "mixed"])
def test_every_scheduler_goes_on_alike_from_every_event(scheduler: str, space: dict[str, Any]) -> None:
    options = {"interval": 1} if scheduler == "pbt" else {}
    config, found = search_config("random", scheduler, 7, space=space, scheduler_options=options)
    recorder = recorded(config, found, seed=3, **FAULTS)
    assert {call.method for call in recorder.calls} >= {"next", "report", "finished", "lost"}
    for first in range(len(recorder.calls)):
        goes_on_alike(recorder, config, found, first)


@pytest.mark.parametrize("synchronous", [False, True])
def test_a_population_goes_on_alike(synchronous: bool) -> None:
    options = {"interval": 1, "quantile": 0.4, "synchronous": synchronous}
    config, space = search_config("random", "pbt", 6, epochs=6, scheduler_options=options)
    recorder = recorded(config, space, points=lambda params: curve(params, 6), seed=1, lose=0.03, interrupt=0.03)
    assert sum(trial.segment for trial in recorder.search.trials.values()) >= 3, "too few were replaced to tell"
    for first in range(0, len(recorder.calls), 2):
        goes_on_alike(recorder, config, space, first)


@pytest.mark.parametrize(
    ("sampler", "options", "space"),
    [
        ("random", {}, MIXED),
        ("tpe", {"startup": 3}, NUMBERS),
        ("tpe", {"startup": 3}, MIXED),
        ("tpe", {"startup": 3, "group": True}, MIXED),
        ("tpe", {"startup": 3, "multivariate": False}, MIXED),
        ("cmaes", {"population": 4}, NUMBERS),
        ("cmaes", {"population": 4, "margin": True}, MIXED),
        ("nsgaii", {"population": 3}, MIXED),
        ("qmc", {}, NUMBERS),
        ("qmc", {"sequence": "halton"}, MIXED),
        ("grid", {}, COUNTABLE),
    ],
)
@pytest.mark.parametrize("scheduler", ["none", "asha"])
def test_every_sampler_goes_on_alike(sampler: str, options: dict[str, Any], space: Any, scheduler: str) -> None:
    config, found = search_config(sampler, scheduler, 14, space=space, epochs=3, sampler_options=options)
    recorder = recorded(config, found, points=lambda params: curve(params, 3), seed=5, **FAULTS)
    for first in range(len(recorder.calls)):
        # Up to the next proposals: a sampler's whole state shows in them.
        goes_on_alike(recorder, config, found, first, calls=14 if first % 10 else None)


def test_the_gaussian_process_goes_on_alike() -> None:
    config, space = search_config("gp", "none", 7, epochs=2, sampler_options={"startup": 3})
    recorder = recorded(config, space, points=lambda params: curve(params, 2), slots=2, seed=2, fail=0.05)
    begun = [index for index, call in enumerate(recorder.calls) if call.method == "next" and call.answer]
    assert len(begun) == 7
    for first in begun:
        assert goes_on_alike(recorder, config, space, first, calls=1) == 1


@pytest.mark.parametrize("sampler", ["nsgaii", "tpe", "random", "qmc"])
def test_several_objectives_go_on_alike(sampler: str) -> None:
    options = {"population": 3} if sampler == "nsgaii" else {"startup": 3} if sampler == "tpe" else {}
    objective = {METRIC: "max", "val/loss": "min"}
    config, space = search_config(sampler, "none", 12, objective=objective, sampler_options=options)
    recorder = recorded(config, space, seed=4, **FAULTS)
    for first in range(len(recorder.calls)):
        goes_on_alike(recorder, config, space, first)
    front = recorder.search.best()
    assert front and all(trial.values is not None and len(trial.values) == 2 for trial in front)


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "qmc", "nsgaii"])
def test_known_trials_are_in_the_journal(sampler: str) -> None:
    config, space = search_config(sampler, "asha", 8)
    recorder = recorded(config, space, known=known_trials(), seed=6)
    assert [recorder.search.trials[number].origin for number in (-1, -2)] == ["tune-1", "tune-1"]
    assert len(recorder.search.best()) == sum(
        trial.state == FINISHED for number, trial in recorder.search.trials.items() if number >= 0
    )
    for first in range(len(recorder.calls)):
        goes_on_alike(recorder, config, space, first)  # without being told of them again


def test_folds_go_on_alike() -> None:
    config, space = search_config("tpe", "asha", 7, cross_validate=True, sampler_options={"startup": 3})
    recorder = recorded(config, space, seed=7, lose=0.05)
    whole = [trial for trial in recorder.search.trials.values() if trial.state == FINISHED]
    assert whole and all(len(trial.folds) == 4 for trial in whole)
    for trial in whole:
        mean = sum(fold[METRIC] for fold in trial.folds) / 4
        assert trial.values == pytest.approx((mean,))
    for first in range(len(recorder.calls)):
        goes_on_alike(recorder, config, space, first)

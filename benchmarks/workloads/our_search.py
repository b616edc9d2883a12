"""Our search in the replay: `trainer.search`, as `trainer tune` drives it, with results from a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from trainer.component import Component, default
from trainer.config import Evaluate, RunConfig, Tune
from trainer.load import load
from trainer.search.journal import Journal
from trainer.search.search import Search
from trainer.search.space import read_space
from trainer.search.trial import Report, Verdict
from workloads.tables import Table

METRIC = "val/objective"


def asha_settings() -> dict[str, Any]:
    """Those of `ASHAScheduler` that are ours by default."""
    options = default("scheduler", "asha").options
    return {
        "grace_period": options["grace"],
        "reduction_factor": options["reduction"],
        "brackets": options["brackets"],
        "stop_last_trials": False,  # in `schedulers/asha.py`, too
    }


def first_points(table: Table, seed: int, count: int) -> list[Mapping[str, Any]]:
    """Those that our search with this seed begins with; at most as many as are drawn before TPE has a say."""
    search = OurSearch(table, seed, "none").search
    points = [search.next() for _ in range(count)]
    return [point.params for point in points if point is not None]


class OurSearch:
    """TPE and a scheduler (`asha`, `none`) with their defaults, but for the options of `sampler`."""

    def __init__(self, table: Table, seed: int, scheduler: str, **sampler: Any) -> None:
        self.iterations = table.iterations
        config = search_config(table, seed, scheduler, sampler)
        self.search = Search(config, read_space(table.space()), Journal())

    def next(self) -> tuple[int, Mapping[str, Any]] | None:
        trial = self.search.next()
        return None if trial is None else (trial.number, trial.params)

    def report(self, number: int, iteration: int, value: float, seconds: float) -> bool:
        is_last = iteration == self.iterations
        report = Report(iteration, iteration, float(iteration), {METRIC: value}, seconds)
        verdict = self.search.report(number, report, is_last)
        if is_last:
            self.search.finished(number)
        elif verdict == Verdict.STOP:
            self.search.pruned(number)
        else:
            assert verdict == Verdict.CONTINUE, verdict
            return True
        return False


def search_config(table: Table, seed: int, scheduler: str, sampler: Mapping[str, Any]) -> RunConfig:
    """A config with the table's space and length. The number of trials is not what ends a replay."""
    base = load("quickstart")
    tpe = default("sampler", "tpe")
    tune = Tune(
        space=table.space(),
        objective={METRIC: table.mode},
        num_samples=100_000,
        sampler=Component("sampler", "tpe", {**tpe.options, **sampler}),
        scheduler=default("scheduler", scheduler),
    )
    train = dataclasses.replace(base.train, max_epochs=table.iterations, max_steps=None)
    return dataclasses.replace(base, seed=seed, tune=tune, train=train, evaluate=Evaluate(every_epochs=1))

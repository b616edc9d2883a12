"""Earlier trials as known points: from searches, runs, folders of both, and MLflow."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from searches import OBJECTIVE, SPACE, log_reports, search_config, search_folder, space, trial

from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.load import load
from trainer.mirrored import MirroredRun
from trainer.run import Run
from trainer.search.known import find_known, reports_of
from trainer.search.known_mlflow import nested
from trainer.search.mirror import SearchMirror
from trainer.search.mirrored import FollowedSearch, MirroredSearch
from trainer.search.results import Results
from trainer.search.space import overrides
from trainer.search.trial import FAILED, FINISHED, PRUNED, Report
from trainer.sending import Mirror
from trainer.tracking import MIRROR_ENVIRONMENT


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return search_config(tmp_path, train={"clip_norm": 1.0})


def past_run(config: RunConfig, of: Any, status: str = "finished", **more: Any) -> Run:
    """A training that nobody searched with."""
    given = [*overrides(of.params), *(f"{key.replace('__', '.')}={value}" for key, value in more.items())]
    base = Path(config.runs_dir).parent / "toy.yaml"
    run = Run.create(load(base, [*given, "name=before"]), 1, "")
    log_reports(run, of)
    run.end_attempt(status)
    run.close()
    return run


def test_trials_of_a_search(config: RunConfig) -> None:
    folder = search_folder(config, "tune-20250101-000000-0000", "finished")
    results = Results(folder)
    given = [trial(0), trial(1, PRUNED, 2), trial(2, FAILED, 1), trial(3)]
    given[3].params = {**given[3].params, "optimizer.lr": 0.5}
    for one in given:
        results.append(one)
    known = find_known(str(folder), config, space())
    assert [(one.number, one.state, one.params, one.values) for one in known.trials] == [
        (-1, FINISHED, given[0].params, given[0].values),
        (-2, PRUNED, given[1].params, given[1].values),
    ]
    assert known.trials[0].reports == given[0].reports and known.trials[0].origin == f"{folder}, trial 0"
    assert known.lines == [
        f"2 of 4 runs of {folder} taken as known points; 1 failed, 1 outside the space (optimizer.lr)"
    ]
    assert [one.number for one in find_known(str(folder), config, space(), first=-7).trials] == [-7, -8]


def test_keys_that_a_search_did_not_vary_come_from_its_base(config: RunConfig) -> None:
    folder = search_folder(config, status="finished")
    narrow = trial(0, params={"optimizer.lr": 0.02})
    Results(folder).append(narrow)
    (found,) = find_known(str(folder), config, space()).trials
    base = load(folder / "base.yaml")
    assert found.params == {
        "optimizer.name": "adamw",
        "optimizer.lr": 0.02,
        "train.clip_norm": base.train.clip_norm,
        "data.batch_size": 10,
    }


def test_a_run_and_the_folder_of_an_experiment(config: RunConfig) -> None:
    good, poor = trial(0), trial(1, PRUNED, 2)
    first = past_run(config, good)
    past_run(config, poor, "stopped")
    past_run(config, trial(2), "failed")
    past_run(config, trial(3), "killed")
    past_run(config, trial(4, params={**trial(4).params, "data.batch_size": 100}))
    past_run(config, trial(5, reports=[Report(1, 10, 1.0, {"val/loss": 1.0}, 1.0)]))
    broken = past_run(config, trial(6))
    (broken.path / "metrics.jsonl").write_text('{"step": 1\n{"step": 2}\n')
    (one,) = find_known(str(first.path), config, space()).trials
    assert one.params == good.params and one.values == good.values and one.origin == str(first.path)
    assert [report.metrics["val/accuracy"] for report in one.reports] == [
        report.metrics["val/accuracy"] for report in good.reports
    ]
    for source in (str(first.path.parent), "before"):
        known = find_known(source, config, space())
        assert [(found.state, found.params) for found in known.trials] == [
            (FINISHED, good.params),
            (PRUNED, poor.params),
        ]
        assert known.lines[0].startswith(f"2 of 7 runs of {source} taken as known points; 2 not finished, ")
        for part in ("1 outside the space (data.batch_size)", "1 without val/accuracy", "1 unreadable"):
            assert part in known.lines[0]


def test_an_experiment_holds_runs_and_searches(config: RunConfig) -> None:
    folder = Path(config.runs_dir) / "before" / "tune-20250101-000000-0000"
    past_run(config, trial(0))
    folder.mkdir()
    (folder / "base.yaml").write_text((config_file := Path(config.runs_dir).parent / "toy.yaml").read_text())
    assert config_file.is_file()
    Results(folder).append(trial(1))
    assert len(find_known("before", config, space()).trials) == 2


def test_the_value_that_counts_is_the_search_s_own(tmp_path: Path) -> None:
    config = search_config(tmp_path, tune={"value": "best"})
    values = [0.5, 0.9, math.nan, 0.7]
    reports = [Report(i, i, 1.0, {"val/accuracy": value}, 1.0) for i, value in enumerate(values, start=1)]
    folder = search_folder(config, status="finished")
    Results(folder, [trial(0, reports=reports), trial(1, PRUNED, reports=reports)])
    assert [one.values for one in find_known(str(folder), config, space()).trials] == [(0.9,), (0.7,)]
    two = search_config(tmp_path, tune={"objective": {"val/accuracy": "max", "val/loss": "min"}, "scheduler": "none"})
    other = search_folder(two, "tune-20250101-000000-1111", "finished")
    Results(other, [trial(0)])
    (found,) = find_known(str(other), two, space()).trials
    last = trial(0).reports[-1].metrics
    assert found.values == (last["val/accuracy"], last["val/loss"])


def test_choices_that_are_mappings_lists_or_hide_under_conditions(config: RunConfig) -> None:
    raw = {
        "schedule": {"choice": [{"name": "constant"}, {"name": "cosine", "warmup_steps": 3}]},
        "optimizer.name": {"choice": ["adamw", "sgd"]},
        "optimizer.momentum": {"uniform": [0.5, 0.9], "when": {"optimizer.name": "sgd"}},
    }
    before = trial(0, params={"optimizer.name": "sgd", "optimizer.momentum": 0.7})
    run = past_run(config, before, schedule="cosine", schedule__warmup_steps=3)
    (found,) = find_known(str(run.path), config, space(raw)).trials
    assert found.params == {
        "schedule": {"name": "cosine", "warmup_steps": 3},
        "optimizer.name": "sgd",
        "optimizer.momentum": 0.7,
    }
    inactive = past_run(config, trial(1, params={"optimizer.name": "adamw"}), schedule="constant")
    (found,) = find_known(str(inactive.path), config, space(raw)).trials
    assert found.params == {"schedule": {"name": "constant"}, "optimizer.name": "adamw"}
    low = trial(2, params={"optimizer.name": "sgd", "optimizer.momentum": 0.1})
    with pytest.raises(UserError, match=r"0 of 1 run of .*; 1 outside the space \(optimizer.momentum\)"):
        find_known(str(past_run(config, low, schedule="constant").path), config, space(raw))


def test_nothing_usable_is_an_error_of_one_line(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source, text in ((str(tmp_path / "empty"), "no run and no trial in"), ("nowhere", "no such folder")):
        with pytest.raises(UserError, match=text) as caught:
            find_known(source, config, space())
        assert "\n" not in str(caught.value) and str(caught.value).startswith("--warm-start")


def test_reports_are_the_entries_that_hold_the_objective() -> None:
    entries = [
        {"step": 5, "time": 100.0, "train/loss": 1.0},
        {"step": 10, "time": 102.0, "epoch": 1.0, "val/accuracy": 0.5, "note": "x"},
        {"step": 20, "time": 110.0, "epoch": 2.0, "val/accuracy": 0.6},
    ]
    assert reports_of(entries, OBJECTIVE) == [
        Report(1, 10, 1.0, {"val/accuracy": 0.5}, 2.0),
        Report(2, 20, 2.0, {"val/accuracy": 0.6}, 10.0),
    ]
    assert reports_of([], OBJECTIVE) == []


def test_parameters_of_mlflow_are_nested_again() -> None:
    flat = {"optimizer.name": "sgd", "optimizer.lr": "0.1", "seed": "0", "a": "1", "a.b": "2"}
    assert nested(flat) == {"optimizer": {"name": "sgd", "lr": "0.1"}, "seed": "0", "a": {"b": "2"}}


def test_runs_and_trials_of_an_mlflow_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in MIRROR_ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = search_config(tmp_path, tracking={"enabled": True, "uri": uri}, train={"clip_norm": 1.0})
    order = {"uri": uri, "experiment": "earlier", "tags": {}, "system_metrics": False, "pid": 1, "process_started": 0}
    runs = [trial(0), trial(1, PRUNED, 2), trial(2)]
    for one, status in zip(runs, ("finished", "stopped", "failed"), strict=True):
        run = past_run(config, one, status)
        assert Mirror(MirroredRun(run), order).drain(status, 60)
    folder = search_folder(config, status="finished")
    folds = trial(7, folds=[{"val/accuracy": 0.5}])
    Results(folder, [trial(4, PRUNED, 2), trial(5, FAILED, 0), trial(6, params={"optimizer.lr": 0.03}), folds])
    assert SearchMirror(MirroredSearch(FollowedSearch(folder)), order).drain("finished", 60)

    known = find_known("earlier", config, space())
    by_params = {json.dumps(one.params, sort_keys=True): one for one in known.trials}
    assert len(by_params) == len(known.trials) == 5
    for one in (runs[0], runs[1]):
        found = by_params[json.dumps(one.params, sort_keys=True)]
        assert (found.state, found.values) == (one.state, one.values)
        assert [report.step for report in found.reports] == [report.step for report in one.reports]
    told = [one for one in known.trials if one.params["optimizer.lr"] == 0.03]
    assert told[0].values == trial(6, params={"optimizer.lr": 0.03}).values, "told to the search, in no run's log"
    assert told[0].params["data.batch_size"] == 10, "as the search's own run has it"
    assert {one.state for one in known.trials} == {FINISHED, PRUNED}
    assert known.lines == ["5 of 7 runs of earlier taken as known points; 2 failed"]
    for one in known.trials:
        assert one.origin is not None and one.origin.startswith("MLflow run ")
        assert all(SPACE[key] and space()[key].contains(value) for key, value in one.params.items())
    with pytest.raises(UserError, match="none of this name in MLflow"):
        find_known("other", config, space())

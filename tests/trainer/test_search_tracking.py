"""A search in MLflow: itself and each trial nested in it, whatever is killed; a real database, a real server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from harness import environment
from mlflow_servers import MlflowServer
from processes import wait_until
from searches import SPACE, log_reports, search_config, search_folder, set_status, trial, trial_run

from trainer import cli
from trainer.config import RunConfig
from trainer.search.mirror import SearchMirror
from trainer.search.mirrored import FollowedSearch, MirroredSearch
from trainer.search.results import Results, write_best
from trainer.search.tracking import SearchTracker, find_searches, is_unsent
from trainer.search.trial import FAILED, FINISHED, PRUNED
from trainer.tracking import MIRROR_ENVIRONMENT, read_state

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRunEntity

LONG = 150.0


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, to be copied: making them takes seconds."""
    file = tmp_path_factory.mktemp("database") / "mlflow.db"
    client_of(f"sqlite:///{file}").search_experiments(max_results=1)
    return file


@pytest.fixture(scope="module")
def mlflow_server(database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    shutil.copy(database, server.database)
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key, value in MIRROR_ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


def client_of(uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def begin(tmp_path: Path, uri: str, **tune: Any) -> tuple[RunConfig, Path, Results]:
    tracking = {"enabled": True, "uri": uri, "tags": {"team": "vision"}, "system_metrics": False}
    config = search_config(tmp_path, tracking=tracking, tune=tune)
    folder = search_folder(config)
    return config, folder, Results(folder)


def copied(database: Path, tmp_path: Path) -> str:
    return f"sqlite:///{shutil.copy(database, tmp_path / 'mlflow.db')}"


def found(uri: str) -> tuple[MlflowRunEntity, dict[str, MlflowRunEntity]]:
    """The search's run, and its trials by name."""
    client = client_of(uri)
    experiment = client.get_experiment_by_name("toy")
    assert experiment is not None
    runs = list(client.search_runs([experiment.experiment_id], max_results=1000))
    (parent,) = [run for run in runs if run.data.tags["trainer.kind"] == "search"]
    children = [run for run in runs if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} <= {parent.info.run_id}
    named = {run.info.run_name: run for run in children}
    assert len(named) == len(children), "each trial once"
    return parent, named


def history(uri: str, run: MlflowRunEntity, metric: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client_of(uri).get_metric_history(run.info.run_id, metric)]


def order_of(config: RunConfig, **more: Any) -> dict[str, Any]:
    return {
        **{"uri": config.tracking.uri, "experiment": "toy", "tags": {}, "system_metrics": False},
        **{"pid": os.getpid(), "process_started": 0, "is_over": False, **more},
    }


def test_a_search_is_one_run_and_each_trial_is_nested_in_it(
    tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUB_TOKEN", "hf_s3cret")
    uri = copied(database, tmp_path)
    config, folder, results = begin(tmp_path, uri)
    tracker = SearchTracker(folder, config)
    tracker.start()
    mirror = wait_until(lambda: mirrors_of(folder), "the mirror")[0]
    ended = [
        trial(0),
        trial(1, PRUNED, 2),
        trial(2, FAILED, 1, error="ValueError: hf_s3cret is no model", traceback="Traceback\n  hf_s3cret"),
        trial(3, FAILED, 0, error="RuntimeError: no memory"),
    ]
    for one in ended:
        if one.reports:
            trial_run(folder, config, one).close()
        results.append(one)
    write_best(folder, [ended[0]], {"val/accuracy": "max"})
    running = trial(4, evaluations=1)
    run = trial_run(folder, config, running)
    wait_until(
        lambda: "t0004" in found(uri)[1] if read_state(folder).get("mlflow_run_id") else False, "trial 4", LONG, 0.2
    )
    status = found(uri)[1]["t0004"].info.status
    assert status == "RUNNING" and found(uri)[0].info.status == "RUNNING"
    assert mirrors_of(folder) == [mirror], "one process for all trials"
    last = trial(4)
    log_reports(run, last, first=1)
    run.close()
    results.append(last)
    (folder / "report.html").write_text("<html>")
    set_status(folder, "finished")
    assert tracker.finish("finished", 60) is None

    parent, children = found(uri)
    assert sorted(children) == ["t0000", "t0001", "t0002", "t0003", "t0004"]
    assert [children[name].info.status for name in sorted(children)] == [
        "FINISHED",
        "FINISHED",
        "FAILED",
        "FAILED",
        "FINISHED",
    ]
    states = [children[name].data.tags["trainer.status"] for name in sorted(children)]
    assert states == [FINISHED, PRUNED, FAILED, FAILED, FINISHED]
    for one in (*ended, last):
        child = children[f"t{one.number:04d}"]
        assert {key: child.data.params[key] for key in one.params} == {
            key: value if isinstance(value, str) else json.dumps(value) for key, value in one.params.items()
        }
        told = [(report.step, report.metrics["val/accuracy"]) for report in one.reports]
        assert history(uri, child, "val/accuracy") == told, one
        if one.values:
            assert child.data.metrics["objective/val/accuracy"] == one.values[0]
    assert children["t0002"].data.tags["trainer.error"] == "ValueError: *** is no model"
    assert "hf_s3cret" not in json.dumps([run.data.tags for run in (parent, *children.values())])
    for name in ("mirror.log", "trials.jsonl"):
        assert "hf_s3cret" not in (folder / name).read_text()
    assert children["t0000"].data.tags["team"] == parent.data.tags["team"] == "vision"
    assert parent.info.status == "FINISHED" and parent.data.tags["trainer.status"] == "finished"
    assert parent.data.params["optimizer.name"] == "adamw" and parent.data.params["tune.value"] == "last"
    values = [(one.values or (0,))[0] for one in (ended[0], last)]
    assert history(uri, parent, "objective/val/accuracy") == [(1, values[0]), (5, values[1])]
    assert history(uri, parent, "best/val/accuracy") == [(1, values[0]), (5, max(values))]
    best = (ended[0], last)[values.index(max(values))]
    assert parent.data.tags["trainer.best.trial"] == str(best.number)
    assert json.loads(parent.data.tags["trainer.best.params"]) == best.params
    files = {file.path for file in client_of(uri).list_artifacts(parent.info.run_id)}
    assert files == {"base.yaml", "best.yaml", "trials.jsonl", "report.html", "search.json"}
    assert not is_unsent(FollowedSearch(folder)) and not mirrors_of(folder)


def mirrors_of(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "trainer.mirror" in line and str(folder) in line and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


SEARCH = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from searches import set_status
from trainer.load import load
from trainer.search.tracking import SearchTracker
folder = Path(sys.argv[1])
set_status(folder, "running")
SearchTracker(folder, load(folder / "base.yaml")).start()
print("on", flush=True)
time.sleep(300)
"""


def search_process(folder: Path) -> subprocess.Popen[str]:
    """A process that works on a search."""
    fixtures = str(Path(__file__).parents[1] / "fixtures")
    line = [sys.executable, "-c", SEARCH, str(folder), fixtures]
    process = subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as told:
        assert told.readline() == "on\n"
    return process


def test_a_killed_search_is_told_so_and_goes_on_as_the_same_run(tmp_path: Path, database: Path) -> None:
    uri = copied(database, tmp_path)
    config, folder, results = begin(tmp_path, uri)
    done, cut = trial(0), trial(1, evaluations=2)
    trial_run(folder, config, done).close()
    results.append(done)
    run = trial_run(folder, config, cut)
    process = search_process(folder)
    process.kill()
    process.wait()
    wait_until(lambda: not mirrors_of(folder), "the end of the mirror", LONG, 0.1)
    parent, children = found(uri)
    assert parent.info.status == "KILLED" and parent.data.tags["trainer.status"] == "killed"
    assert children["t0000"].info.status == "FINISHED" and children["t0001"].info.status == "KILLED"
    assert not is_unsent(FollowedSearch(folder)), "the mirror outlived the search until all was sent"

    set_status(folder, "running")
    tracker = SearchTracker(folder, config)
    tracker.start()
    log_reports(run, trial(1), first=2)
    run.close()
    results.append(trial(1))
    set_status(folder, "interrupted")
    assert tracker.finish("interrupted", 60) is None
    again, children = found(uri)
    assert again.info.run_id == parent.info.run_id and again.data.tags["trainer.status"] == "interrupted"
    assert children["t0001"].info.status == "FINISHED"
    assert [step for step, _ in history(uri, children["t0001"], "val/accuracy")] == [10, 20, 30, 40]


def test_a_killed_mirror_is_started_again_and_sends_nothing_twice(tmp_path: Path, database: Path) -> None:
    uri = copied(database, tmp_path)
    config, folder, results = begin(tmp_path, uri)
    tracker = SearchTracker(folder, config)
    tracker.start()
    for number in range(6):
        trial_run(folder, config, trial(number)).close()
        results.append(trial(number))
    wait_until(lambda: (folder / "mlflow").is_dir(), "its first trials", LONG, 0.05)
    for mirror in mirrors_of(folder):
        mirror.kill()
    for number in range(6, 8):
        trial_run(folder, config, trial(number)).close()
        results.append(trial(number))
    set_status(folder, "finished")
    assert tracker.finish("finished", 60) is None
    _, children = found(uri)
    assert len(children) == 8 and {run.info.status for run in children.values()} == {"FINISHED"}
    for number in range(8):
        assert len(history(uri, children[f"t{number:04d}"], "val/accuracy")) == 4
        assert len(history(uri, children[f"t{number:04d}"], "objective/val/accuracy")) == 1


def test_a_server_that_dies_holds_no_search_and_gets_all_later(
    tmp_path: Path, mlflow_server: MlflowServer, capsys: pytest.CaptureFixture[str]
) -> None:
    mlflow_server.ensure()
    config, folder, results = begin(tmp_path, mlflow_server.address)
    tracker = SearchTracker(folder, config)
    tracker.start()
    trial_run(folder, config, trial(0)).close()
    results.append(trial(0))
    state = folder / "mlflow" / "t0000" / "tracking.json"
    wait_until(lambda: state.exists() and json.loads(state.read_text())["state"] == "done", "trial 0", LONG, 0.1)
    mlflow_server.kill()
    for number in range(1, 4):
        trial_run(folder, config, trial(number)).close()
        results.append(trial(number))
    wait_until(tracker.problem, "the news that nobody answers", LONG, 0.1)
    set_status(folder, "finished")
    began = time.monotonic()
    warning = tracker.finish("finished")
    assert time.monotonic() - began < 10
    assert warning is not None and mlflow_server.address in warning and "\n" not in warning
    assert warning.endswith(f"send the rest with: trainer runs sync {folder}")
    assert "values were not sent" in warning and is_unsent(FollowedSearch(folder))

    mlflow_server.start()
    assert [search.path for search in find_searches(config.runs_dir)] == [folder]
    assert cli.main(["runs", "sync", "--runs-dir", config.runs_dir]) == 0
    assert capsys.readouterr().out == f"all of {folder} is in MLflow; look at it with: {mlflow_server.address}\n" + (
        f"all runs in {config.runs_dir}/ are in MLflow\n"
    )
    parent, children = found(mlflow_server.address)
    assert sorted(children) == [f"t{number:04d}" for number in range(4)]
    for child in children.values():
        assert child.info.status == "FINISHED" and len(history(mlflow_server.address, child, "val/accuracy")) == 4
    assert parent.info.status == "FINISHED" and not is_unsent(FollowedSearch(folder))
    assert cli.main(["runs", "sync", str(folder)]) == 0, "again, with nothing left"


def test_folds_and_segments_of_one_trial_are_one_run(tmp_path: Path, database: Path) -> None:
    uri = copied(database, tmp_path)
    config, folder, results = begin(tmp_path, uri, scheduler="pbt", space={"optimizer.lr": SPACE["optimizer.lr"]})
    for fold in (0, 1):
        trial_run(folder, config, trial(0, evaluations=2), f"t0000-f{fold}").close()
    before = trial(1, evaluations=2, params={"optimizer.lr": 0.01})
    trial_run(folder, config, before).close()
    after = trial(1, history=[{"params": before.params, "iteration": 2}], params={"optimizer.lr": 0.02})
    second = trial_run(folder, config, trial(1, evaluations=0))
    log_reports(second, after, first=2)
    second.close()
    mirror = SearchMirror(MirroredSearch(FollowedSearch(folder)), order_of(config))
    assert mirror.send(time.monotonic() + 60), mirror.state
    assert not found(uri)[1]["t0001"].data.params, "they may be replaced, and MLflow lets none change"
    results.append(trial(0, evaluations=2))
    results.append(after)
    assert mirror.drain("finished", 60)
    _, children = found(uri)
    assert [step for step, _ in history(uri, children["t0000"], "fold-1/val/accuracy")] == [10, 20]
    assert [step for step, _ in history(uri, children["t0001"], "val/accuracy")] == [10, 20, 30, 40]
    assert children["t0001"].data.params["optimizer.lr"] == "0.02"
    assert json.loads(children["t0001"].data.tags["trainer.history"])[0]["iteration"] == 2


def test_a_search_that_mlflow_lost_is_sent_from_the_beginning(tmp_path: Path, database: Path) -> None:
    uri = copied(database, tmp_path)
    config, folder, results = begin(tmp_path, uri)
    trial_run(folder, config, trial(0)).close()
    results.append(trial(0))
    assert SearchMirror(MirroredSearch(FollowedSearch(folder)), order_of(config)).drain("finished", 60)
    shutil.copy(database, tmp_path / "other.db")
    elsewhere = f"sqlite:///{tmp_path / 'other.db'}"
    again = SearchMirror(MirroredSearch(FollowedSearch(folder)), order_of(config, uri=elsewhere, is_over=True))
    assert again.drain("finished", 60)
    _, children = found(elsewhere)
    assert len(history(elsewhere, children["t0000"], "val/accuracy")) == 4
    entry = json.loads((folder / "trials.jsonl").read_text())
    assert children["t0000"].info.end_time == int(1000 * entry["ended"]), "when it ended, not when it was sent"


def test_the_number_of_waiting_values_is_told(tmp_path: Path) -> None:
    config, folder, results = begin(tmp_path, "http://127.0.0.1:9")
    for number in range(2):
        trial_run(folder, config, trial(number)).close()
        results.append(trial(number))
    mirror = SearchMirror(MirroredSearch(FollowedSearch(folder)), order_of(config))
    assert not mirror.send(time.monotonic() + 60)
    # All but step and time of each entry; each trial was told one value, and the search tells it beside the best so far
    each = sum(
        len(json.loads(line)) - 2
        for line in next((folder / "trials" / "t0000").glob("*/metrics.jsonl")).read_text().splitlines()
    )
    assert mirror.count_pending() == 2 * each + 2 * 1 + 2 * 2
    assert "Connection refused" in read_state(folder)["last_error"]


def test_signals_of_the_terminal_do_not_reach_the_mirror(tmp_path: Path, database: Path) -> None:
    config, folder, _ = begin(tmp_path, copied(database, tmp_path))
    tracker = SearchTracker(folder, config)
    tracker.start()
    (mirror,) = wait_until(lambda: mirrors_of(folder), "the mirror")
    wait_until(lambda: read_state(folder).get("mlflow_run_id"), "its run", LONG, 0.1)
    for number in (signal.SIGINT, signal.SIGTERM):
        mirror.send_signal(number)
    set_status(folder, "interrupted")
    assert tracker.finish("interrupted", 60) is None
    assert found(str(config.tracking.uri))[0].info.status == "KILLED"


def test_without_tracking_nothing_is_started(tmp_path: Path) -> None:
    config = search_config(tmp_path)
    folder = search_folder(config, status="finished")
    tracker = SearchTracker(folder, config)
    tracker.start()
    assert tracker.finish("finished") is None and not (folder / "tracking.json").exists()
    assert not is_unsent(FollowedSearch(folder))
    assert not is_unsent(FollowedSearch(tmp_path / "none"))

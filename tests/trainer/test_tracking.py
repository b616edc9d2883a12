"""The mirror to MLflow: real databases, a real server, real deaths."""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from harness import environment, toy_config

from trainer import mirror as mirror_module
from trainer.config import RunConfig, Tracking
from trainer.environment import process_started
from trainer.errors import UserError
from trainer.load import load
from trainer.mirror import Mirror
from trainer.mirrored import MirroredRun
from trainer.mlflow_sink import flatten
from trainer.run import Run
from trainer.spool import Tail
from trainer.system_metrics import SystemMetrics
from trainer.tracking import MLFLOW_ENVIRONMENT, Tracker, mlflow_command, read_state, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Home of all runs of this file, with one database: making its tables takes seconds."""
    return tmp_path_factory.mktemp("tracking")


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for key, value in MLFLOW_ENVIRONMENT.items():
        monkeypatch.setenv(key, value)


def tracked(folder: Path, **tracking: Any) -> RunConfig:
    return load(toy_config(folder, tracking={"enabled": True, **tracking}))


def start(folder: Path, **tracking: Any) -> tuple[Run, Tracker]:
    config = tracked(folder, **tracking)
    run = Run.create(config, world_size=1, data_fingerprint="")
    return run, Tracker(run, config.tracking)


def client_of(uri: str) -> MlflowClient:
    from mlflow import MlflowClient  # within a test, so that it finds the settings above

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def log(run: Run, first: int, last: int) -> None:
    for step in range(first, last + 1):
        run.log({"step": step, "epoch": step / 10, "time": 1e9 + step, "train/loss": 1 / step})


def wait_for(condition: Callable[[], Any], seconds: float = 150) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        result = condition()
        if result:
            return result
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s")


def steps_in(client: MlflowClient, run: Run, key: str = "train/loss") -> list[int]:
    history = client.get_metric_history(read_state(run.path)["mlflow_run_id"], key)
    return sorted(point.step for point in history)


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def mirrors_of(run: Run) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "trainer.mirror" in (process.info["cmdline"] or ()) and str(run.path) in process.info["cmdline"]:
            found.append(process)
    return found


def test_all_of_a_run_is_in_mlflow(folder: Path) -> None:
    run, tracker = start(folder, experiment="digits", tags={"team": "vision"})
    (run.artifacts / "val").mkdir()
    (run.artifacts / "val" / "confusion.png").write_bytes(b"a picture")
    begin = time.perf_counter()
    tracker.start()
    assert time.perf_counter() - begin < 1
    (process,) = wait_for(lambda: mirrors_of(run))
    wait_for(lambda: read_state(run.path).get("state") == "sending")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
    log(run, 1, 2500)
    run.log({"step": 2500, "time": 1e9, "val/loss": math.nan, "val/accuracy@5": 0.5, "val/worst": math.inf})
    (run.artifacts / "val" / "confusion.png").write_bytes(b"a better picture")
    run.end_attempt("finished")
    assert tracker.finish("finished", 120) is None
    assert not process.is_running()

    client = client_of(tracker.uri)
    state = read_state(run.path)
    found = client.get_run(run.record["mlflow_run_id"])
    assert found.info.status == "FINISHED" and found.info.run_name == run.id and found.info.end_time is not None
    assert client.get_experiment(found.info.experiment_id).name == "digits"
    assert state["state"] == "done" and state["pending"] == 0 and state["last_error"] is None
    assert steps_in(client, run) == list(range(1, 2501))
    point = client.get_metric_history(found.info.run_id, "train/loss")[0]
    assert point.value == 1 / point.step and point.timestamp == 1000 * (10**9 + point.step)
    assert math.isnan(found.data.metrics["val/loss"]) and found.data.metrics["val/worst"] > 1e300
    assert found.data.metrics["val/accuracy_5"] == 0.5
    params = {"name": "toy", "data.batch_size": "10", "train.max_epochs": "2", "checkpoint.monitor": "null"}
    assert params.items() <= found.data.params.items()
    tags = {"team": "vision", "trainer.status": "finished", "trainer.lineage": run.record["lineage"]["id"]}
    assert tags.items() <= found.data.tags.items()
    assert found.data.metrics["system/process_memory_megabytes"] > 10
    assert found.data.metrics["system/cpu_utilization_percentage"] >= 0

    stored = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert {"config.yaml", "environment.txt", "run.json", "val"} <= stored
    local = Path(client.download_artifacts(found.info.run_id, "val/confusion.png"))
    assert local.read_bytes() == b"a better picture"
    assert found.info.artifact_uri.startswith((folder / "runs" / "mlartifacts" / "digits").as_uri())
    record = json.loads(Path(client.download_artifacts(found.info.run_id, "run.json")).read_text())
    assert record["status"] == "finished"
    assert not Path("mlruns").exists() and not Path("mlflow.db").exists()


def order_of(run: Run, tracker: Tracker, **changes: Any) -> dict[str, Any]:
    pid = os.getpid()
    order = {"uri": tracker.uri, "experiment": "toy", "tags": {}, "system_metrics": False}
    return {**order, "pid": pid, "process_started": process_started(pid), **changes}


def test_a_run_that_was_judged_to_stop_has_finished_for_mlflow(folder: Path) -> None:
    run, tracker = start(folder)
    log(run, 1, 3)
    assert Mirror(MirroredRun(run), order_of(run, tracker)).drain("stopped", 60)
    found = client_of(tracker.uri).get_run(run.record["mlflow_run_id"])
    assert found.info.status == "FINISHED" and found.data.tags["trainer.status"] == "stopped"


def test_a_resumed_run_goes_on_and_no_step_is_sent_twice(folder: Path) -> None:
    run, tracker = start(folder)
    order = order_of(run, tracker)
    log(run, 1, 10)
    assert Mirror(MirroredRun(run), order).drain("preempted", 60)
    client = client_of(tracker.uri)
    first = client.get_run(run.record["mlflow_run_id"])
    assert first.info.status == "KILLED" and first.data.tags["trainer.status"] == "preempted"

    run.end_attempt("preempted")
    run.begin_attempt(2)
    assert run.rewind(6) == 4
    for step in range(7, 13):  # as another machine computes it: MLflow keeps what it has, metrics.jsonl is the truth
        run.log({"step": step, "time": 2e9, "train/loss": 5.0})
    again = Mirror(MirroredRun(run), order)
    assert again.send(time.monotonic() + 60)
    assert client.get_run(first.info.run_id).info.status == "RUNNING"
    assert run.rewind(11) == 1  # also while it is followed
    log(run, 12, 13)
    assert again.drain("finished", 60)
    run.close()

    assert steps_in(client, run) == list(range(1, 14))
    assert client.get_run(first.info.run_id).info.status == "FINISHED"
    assert run.record["mlflow_run_id"] == first.info.run_id


def test_a_run_that_mlflow_lost_is_sent_from_the_beginning(folder: Path) -> None:
    run, tracker = start(folder)
    order = order_of(run, tracker)
    log(run, 1, 5)
    assert Mirror(MirroredRun(run), order).drain("preempted", 60)
    client = client_of(tracker.uri)
    lost = run.record["mlflow_run_id"]
    client.delete_run(lost)
    log(run, 6, 6)
    assert Mirror(MirroredRun(run), order).drain("finished", 60)
    assert run.record["mlflow_run_id"] != lost
    assert steps_in(client, run) == [1, 2, 3, 4, 5, 6]
    # The id can be lost too: a mirror that was killed before it wrote it down
    (run.path / "tracking.json").unlink()
    assert Mirror(MirroredRun(run), order).drain("finished", 60)
    assert read_state(run.path)["mlflow_run_id"] == run.record["mlflow_run_id"]
    assert steps_in(client, run) == [1, 2, 3, 4, 5, 6]
    run.close()


def test_changed_parameters_do_not_stop_the_mirror(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, tracker = start(folder)
    log(run, 1, 1)
    assert Mirror(MirroredRun(run), order_of(run, tracker)).drain("preempted", 60)
    config = (run.path / "config.yaml").read_text()
    (run.path / "config.yaml").write_text(config.replace("max_epochs: 2", "max_epochs: 3"))
    assert Mirror(MirroredRun(run), order_of(run, tracker)).drain("finished", 60)
    assert "keeps the first values of these parameters: train.max_epochs" in capsys.readouterr().err
    found = client_of(tracker.uri).get_run(run.record["mlflow_run_id"])
    assert found.data.params["train.max_epochs"] == "2" and found.info.status == "FINISHED"
    run.close()


def test_a_name_that_mlflow_refuses_takes_nothing_with_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, tracker = start(folder)
    for step in range(1, 4):
        run.log({"step": step, "time": 1e9, "train/loss": 1.0, "../loss": 2.0})
    assert Mirror(MirroredRun(run), order_of(run, tracker)).drain("finished", 60)
    assert steps_in(client_of(tracker.uri), run) == [1, 2, 3]
    assert read_state(run.path)["refused"] == 3
    assert "MLflow refuses metrics of these names: ../loss" in capsys.readouterr().err
    run.close()


def test_a_deleted_experiment_is_told(folder: Path) -> None:
    run, tracker = start(folder, experiment="gone")
    order = order_of(run, tracker, experiment="gone")
    client = client_of(tracker.uri)
    client.delete_experiment(client.create_experiment("gone"))
    log(run, 1, 3)
    assert not Mirror(MirroredRun(run), order).drain("finished", 0.5)
    state = read_state(run.path)
    assert state["state"] == "incomplete" and state["pending"] == 6
    assert "experiment 'gone' was deleted in MLflow: restore it" in state["last_error"]
    assert tracker.problem() == state["last_error"]
    run.close()


TRAINING = """
import os, sys, time
from pathlib import Path
from trainer.load import load
from trainer.run import Run
from trainer.tracking import Tracker
config = load(sys.argv[1])
run = Run.create(config, 1, "")
Tracker(run, config.tracking).start()
if os.fork() == 0:  # a data worker: it holds the mirror's pipe open although its parent is dead
    time.sleep(300)
    os._exit(0)
for step in range(1, 6):
    run.log({"step": step, "time": 1e9, "train/loss": 1.0})
print(run.path, flush=True)
time.sleep(300)
"""


def test_a_killed_training_is_mirrored_to_its_end(folder: Path) -> None:
    path = toy_config(folder, tracking={"enabled": True})
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(path)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    run = Run.open(process.stdout.readline().strip())
    (process_of_mirror,) = wait_for(lambda: mirrors_of(run))
    (worker,) = (child for child in psutil.Process(process.pid).children() if child != process_of_mirror)
    process.kill()
    process.wait()
    process.stdout.close()
    try:
        wait_for(lambda: has_ended(process_of_mirror))
        assert worker.is_running()
    finally:
        worker.kill()
    assert run.record["status"] == "killed" and run.record["attempts"][0]["status"] == "killed"
    assert "ended without a word" in run.record["exit_reason"]
    client = client_of(tracking_uri(Tracking(), folder / "runs"))
    found = client.get_run(run.record["mlflow_run_id"])
    assert found.info.status == "KILLED" and found.data.tags["trainer.status"] == "killed"
    assert steps_in(client, run) == [1, 2, 3, 4, 5]


def test_what_a_process_wrote_before_it_died_is_kept(folder: Path) -> None:
    run, tracker = start(folder)
    order = order_of(run, tracker)
    run.end_attempt("failed", "ValueError")
    assert mirror_module.final_status(run, order) == "failed"
    run.begin_attempt(1)
    assert mirror_module.final_status(run, {**order, "process_started": 1}) == "killed"
    assert run.record["status"] == "running", "another process has taken the run over"
    assert mirror_module.final_status(run, order) == "killed"
    assert run.record["status"] == "killed"


def test_two_jobs_may_make_the_same_new_database_where_a_third_was_killed(tmp_path: Path) -> None:
    jobs = [start(tmp_path) for _ in range(2)]
    (tmp_path / "runs" / ".mlflow.db.unfinished").write_bytes(b"half of a database")
    for run, tracker in jobs:
        tracker.start()
        log(run, 1, 3)
        run.close()
    for run, tracker in jobs:
        assert tracker.finish("finished", 100) is None
        assert steps_in(client_of(tracker.uri), run) == [1, 2, 3]
    assert len({read_state(run.path)["mlflow_run_id"] for run, _ in jobs}) == 2
    left = {path.name for path in (tmp_path / "runs").iterdir()}
    assert left == {"toy", "mlflow.db", "mlflow.db.lock", "mlartifacts"}


def test_a_locked_database_is_waited_for(folder: Path) -> None:
    run, tracker = start(folder)
    log(run, 1, 3)
    follower = Mirror(MirroredRun(run), order_of(run, tracker))
    assert follower.send(time.monotonic() + 60)
    other = sqlite3.connect(folder / "runs" / "mlflow.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    threading.Timer(1.0, lambda: other.execute("ROLLBACK")).start()
    log(run, 4, 6)
    begin = time.monotonic()
    assert follower.drain("finished", 60) and time.monotonic() - begin > 0.5
    other.close()
    assert steps_in(client_of(tracker.uri), run) == [1, 2, 3, 4, 5, 6]
    run.close()


def test_a_mirror_that_hangs_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, tracker = start(folder)
    monkeypatch.setattr("trainer.tracking.WAIT_MARGIN", 0.1)
    tracker.start()
    (process,) = wait_for(lambda: mirrors_of(run))
    process.suspend()
    warning = tracker.finish("finished", 0.2)
    assert warning is not None and "not all was sent (no answer in time)" in warning
    assert not process.is_running() and read_state(run.path)["state"] == "incomplete"


def test_a_mirror_that_is_killed_is_started_again_and_loses_nothing(folder: Path) -> None:
    run, tracker = start(folder)
    tracker.start()
    wait_for(lambda: read_state(run.path).get("state") == "sending")
    (first,) = mirrors_of(run)
    log(run, 1, 10)
    first.kill()
    log(run, 11, 20)
    (second,) = wait_for(lambda: [process for process in mirrors_of(run) if process.pid != first.pid])
    second.kill()  # before it could do anything
    run.end_attempt("finished")
    assert tracker.finish("finished", 100) is None
    assert steps_in(client_of(tracker.uri), run) == list(range(1, 21)) and not mirrors_of(run)


def test_a_mirror_that_dies_again_and_again_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.mirror_process.RESTARTS", 1)
    monkeypatch.setattr("trainer.mirror_process.RESTART_SECONDS", 0.0)
    run, tracker = start(folder)
    tracker.start()
    (first,) = wait_for(lambda: mirrors_of(run))
    first.kill()
    (second,) = wait_for(lambda: [process for process in mirrors_of(run) if process.pid != first.pid])
    second.kill()
    second.wait(10)
    warning = tracker.finish("finished", 5)
    assert warning is not None and "mirror.log" in warning and "trainer runs sync" in warning
    assert not mirrors_of(run)


def test_a_mirror_that_cannot_be_started_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, tracker = start(folder)
    monkeypatch.setattr(sys, "executable", str(folder / "no-python"))
    tracker.start()
    assert capsys.readouterr().err.startswith("warning: MLflow is not mirrored: [Errno 2]")
    assert tracker.finish("finished") == "MLflow: nothing was mirrored"


def test_tracking_switched_off_leaves_no_trace(tmp_path: Path) -> None:
    config = load(toy_config(tmp_path))
    run = Run.create(config, 1, "")
    tracker = Tracker(run, config.tracking)
    tracker.start()
    assert tracker.finish("finished") is None and not mirrors_of(run)
    assert not (run.path / "mirror.log").exists() and not (tmp_path / "runs" / "mlflow.db").exists()


def test_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = tracking_uri(Tracking(), tmp_path)
    assert default == f"sqlite:///{tmp_path}/mlflow.db"
    assert mlflow_command(default).endswith(f"mlflow ui --backend-store-uri {default}")
    assert tracking_uri(Tracking(uri="http://host:5000"), tmp_path) == "http://host:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://other")
    assert tracking_uri(Tracking(), tmp_path) == "http://other"
    assert tracking_uri(Tracking(uri="http://host:5000"), tmp_path) == "http://host:5000"
    for uri in ("./mlruns", "file:///data/mlruns"):
        with pytest.raises(UserError, match=r"tracking\.uri: .* is a folder, .* sqlite:///"):
            tracking_uri(Tracking(uri=uri), tmp_path)
    assert "'sqlite:///a b.db'" in mlflow_command("sqlite:///a b.db")
    assert mlflow_command("postgresql://u:secret@h/db").endswith("postgresql://u@h/db")


def test_the_tail_follows_appending_and_replacing(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    tail = Tail(file)
    assert tail.read() == ([], False)
    file.write_bytes(b"a\nb\nc")
    assert tail.read() == ([b"a", b"b"], False)
    with file.open("ab") as out:
        out.write(b"c\n")
    assert tail.read() == ([b"cc"], False) and tail.read() == ([], False)
    (tmp_path / "new").write_bytes(b"a\nx\n")
    os.replace(tmp_path / "new", file)
    assert tail.read() == ([b"a", b"x"], True)
    file.write_bytes(b"y\n")
    assert tail.read() == ([b"y"], True)


def test_parameters_are_flat_and_within_limits() -> None:
    config = {"a": {"b": 1, "c": [1, {"d": None}], "e": {}}, "f": "x" * 7000, "g@5": True, "h": None}
    flat = dict(flatten(config))
    assert flat.pop("f") == "x" * 6000
    assert flat == {"a.b": "1", "a.c": '[1, {"d": null}]', "a.e": "{}", "g_5": "true", "h": "null"}


def test_system_metrics_see_the_children_of_a_process() -> None:
    code = "import time; block = bytearray(200_000_000); print('ready', flush=True); time.sleep(60)"
    sampler = SystemMetrics(os.getpid())
    before = sampler.sample()["system/process_memory_megabytes"]
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    values = sampler.sample()
    child.kill()
    child.communicate()
    assert values["system/process_memory_megabytes"] - before > 190
    assert 0 < values["system/system_memory_usage_percentage"] < 100
    assert sampler.sample()["system/process_memory_megabytes"] < before + 50, "a child that ended is left out"
    gone = SystemMetrics(child.pid).sample()
    assert "system/process_memory_megabytes" not in gone and "system/cpu_utilization_percentage" in gone


FAKE_LIBRARY = """
class NVMLError(Exception): pass
class Memory: used, total = 3_000_000_000, 12_000_000_000
class Rates: gpu = 87
def nvmlInit(): pass
def nvmlDeviceGetCount(): return 2
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetMemoryInfo(handle): return Memory
def nvmlDeviceGetUtilizationRates(handle):
    if handle == 1: raise NVMLError("not supported")
    return Rates
"""


def test_system_metrics_of_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    (tmp_path / "pynvml.py").write_text(FAKE_LIBRARY)
    values = {key: value for key, value in SystemMetrics(os.getpid()).sample().items() if "gpu" in key}
    assert values == {
        "system/gpu_0_utilization_percentage": 87,
        "system/gpu_0_memory_usage_megabytes": 3000.0,
        "system/gpu_0_memory_usage_percentage": 25.0,
    }
    sys.modules["pynvml"].nvmlInit = lambda: (_ for _ in ()).throw(sys.modules["pynvml"].NVMLError("no driver"))
    assert not any("gpu" in key for key in SystemMetrics(os.getpid()).sample())

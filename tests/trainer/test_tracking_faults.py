"""MLflow in trouble: servers that are down, die, crawl, refuse or swallow, and disks that are full. What was logged is
in MLflow in the end, once, and no training waits for it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import soak
from disks import fill, small_disk
from harness import environment, toy_config
from mlflow_servers import (
    Answer,
    Behaviour,
    Gateway,
    MlflowServer,
    accepting_and_silent,
    dropping_connections,
    values_in,
    values_logged,
)
from processes import ForkServer, wait_until

from trainer import cli
from trainer.contact import FIRST_TIMEOUT, Contact
from trainer.load import load
from trainer.mirror import Mirror
from trainer.mirrored import MirroredRun
from trainer.run import Run
from trainer.tracking import MIRROR_ENVIRONMENT, Tracker, mlflow_command, read_state
from trainer.unsent import is_unsent

if TYPE_CHECKING:
    from mlflow import MlflowClient

LONG = 150.0
Survived = Callable[[str], None]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, to be copied: making them takes seconds."""
    file = tmp_path_factory.mktemp("database") / "mlflow.db"
    client_of(f"sqlite:///{file}").search_experiments(max_results=1)
    return file


@pytest.fixture(scope="module")
def mlflow_server(database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """Not started yet."""
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    shutil.copy(database, server.database)
    yield server
    server.kill()


@pytest.fixture
def gateway(mlflow_server: MlflowServer) -> Iterator[Gateway]:
    """Before a server that runs."""
    mlflow_server.ensure()
    gateway = Gateway(mlflow_server.port)
    yield gateway
    gateway.close()


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for key, value in MIRROR_ENVIRONMENT.items():
        monkeypatch.setenv(key, value)


def client_of(uri: str) -> MlflowClient:
    from mlflow import MlflowClient  # within a test, so that it finds the settings above

    return MlflowClient(uri)


def start(
    folder: Path, uri: str | None = None, say: Callable[[str], None] | None = None, **tracking: Any
) -> tuple[Run, Tracker]:
    settings = {"enabled": True, "uri": uri, "system_metrics": False, **tracking}
    config = load(toy_config(folder, tracking=settings))
    run = Run.create(config, world_size=1, data_fingerprint="")
    return run, Tracker(run, config.tracking, say)


def order_of(run: Run, uri: str, **changes: Any) -> dict[str, Any]:
    return {"uri": uri, "experiment": "toy", "tags": {}, "system_metrics": False, **changes}


def log(run: Run, first: int, last: int) -> None:
    for step in range(first, last + 1):
        run.log({"step": step, "epoch": step / 10, "time": 1e9 + step, "train/loss": 1 / step})


def status_in(database: Path, run: Run) -> str:
    connection = sqlite3.connect(database)
    rows = connection.execute("SELECT status FROM runs WHERE name = ?", (run.id,)).fetchall()
    connection.close()
    assert len(rows) == 1, rows
    return str(rows[0][0])


def mirrors_of(run: Run) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "trainer.mirror" in (process.info["cmdline"] or ()) and str(run.path) in process.info["cmdline"]:
            found.append(process)
    return found


def sync(*args: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainer", "runs", "sync", *args]
    return subprocess.run(
        command, cwd=cwd, env=environment(**variables), capture_output=True, text=True, timeout=soak.choose(120, 1800)
    )


def test_a_server_that_is_down_at_the_start_gets_all_later(
    tmp_path: Path, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow_server.kill()
    with_password = mlflow_server.address.replace("http://", "http://ann:s3cret@")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", with_password)
    said: list[str] = []
    short, short_tracker = start(tmp_path, say=said.append)
    long, long_tracker = start(tmp_path)
    assert short_tracker.uri == with_password
    for run, tracker in ((short, short_tracker), (long, long_tracker)):
        tracker.start()
        before = time.perf_counter()
        log(run, 1, 3000)
        assert time.perf_counter() - before < 1
    wait_until(lambda: said, "the news that there is no server", LONG)
    assert said == [f"MLflow takes nothing ({short_tracker.problem()}); the training goes on, and sends it later"]
    short.end_attempt("finished")
    begin = time.monotonic()
    warning = short_tracker.finish("finished")
    assert time.monotonic() - begin < 2
    assert warning is not None and warning.startswith("MLflow: 6000 values were not sent (")
    assert warning.endswith(f"Connection refused); send the rest with: trainer runs sync {short.path}")
    assert read_state(short.path)["state"] == "incomplete" and not mirrors_of(short)
    for file in short.path.rglob("*"):
        assert not file.is_file() or b"s3cret" not in file.read_bytes(), file

    mlflow_server.start()
    (short.artifacts / "picture.png").write_bytes(b"a picture")
    done = sync(str(short.path), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    log(long, 3001, 3100)
    assert long_tracker.finish("finished", 60) is None
    for run in (short, long):
        assert values_in(mlflow_server.database, run) == values_logged(run)
        assert status_in(mlflow_server.database, run) == "FINISHED"
        run.close()
    client = client_of(mlflow_server.address)
    picture = client.download_artifacts(json.loads(done.stdout)["mlflow_run_id"], "picture.png", str(tmp_path))
    assert Path(picture).read_bytes() == b"a picture"
    assert mlflow_command(with_password) == mlflow_server.address.replace("http://", "http://ann@")


def test_a_server_that_comes_back_just_before_the_end_gets_everything(tmp_path: Path, gateway: Gateway) -> None:
    gateway.behaviour = refusing(503, b"<html>soon</html>")
    run, tracker = start(tmp_path, gateway.address)
    log(run, 1, 100)
    tracker.start()
    wait_until(tracker.problem, "the news that it refuses all", LONG)
    gateway.requests.clear()
    gateway.delay = 1.0  # longer than a server that is down is waited for
    gateway.behaviour = lambda gateway, request, sent: None
    wait_until(lambda: len(gateway.requests) > 1, "the first answer, with an attempt under way", LONG)
    run.end_attempt("finished")
    assert tracker.finish("finished", 60) is None
    assert read_state(run.path)["state"] == "done" and not is_unsent(run)
    run.close()


@pytest.mark.soak
def test_a_server_that_dies_and_comes_back_loses_nothing(
    tmp_path: Path, mlflow_server: MlflowServer, survived: Survived
) -> None:
    mlflow_server.ensure()
    run, tracker = start(tmp_path, mlflow_server.address)
    tracker.start()
    deaths = soak.choose(1, 5)
    for last in range(0, 5000 * deaths, 5000):
        log(run, last + 1, last + 4900)
        before = len(values_in(mlflow_server.database, run))
        wait_until(lambda b=before: len(values_in(mlflow_server.database, run)) > b, "values", LONG, 0.01)
        mlflow_server.kill()
        assert len(values_in(mlflow_server.database, run)) < before + 2 * 4900, "in the middle of taking them"
        log(run, last + 4901, last + 5000)
        wait_until(tracker.problem, "the news that the server is gone", LONG, 0.1)
        mlflow_server.start()
    log(run, 5000 * deaths + 1, 5000 * deaths + 100)
    wait_until(lambda: tracker.problem() is None, "the news that it is back", LONG, 0.1)
    run.end_attempt("finished")
    assert tracker.finish("finished", 60) is None
    assert values_in(mlflow_server.database, run) == values_logged(run)
    assert status_in(mlflow_server.database, run) == "FINISHED"
    survived(f"{deaths} deaths of the MLflow server: {len(values_logged(run))} values, none lost, none doubled")
    run.close()


@pytest.mark.soak
def test_a_server_that_answers_late_gets_everything(
    tmp_path: Path, gateway: Gateway, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch, survived: Survived
) -> None:
    gateway.delay = soak.choose(1.05, 30.0)
    first = soak.choose(1, int(FIRST_TIMEOUT))  # shorter than the delay
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", str(first))
    run, tracker = start(tmp_path, gateway.address)
    log(run, 1, soak.choose(400, 1500))
    if soak.IN_FULL:
        tracker.start()
        wait_until(lambda: gateway.requests, "the first request", LONG)
        begin = time.monotonic()
        warning = tracker.finish("finished")
        assert time.monotonic() - begin < 5, "a server that never answered yet holds nobody"
        assert warning is not None and "3000 values were not sent" in warning and not mirrors_of(run)
        run.end_attempt("finished")
        done = sync(str(run.path), "--wait", "1500", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    else:
        assert Mirror(MirroredRun(run), order_of(run, gateway.address)).drain("finished", 90)
    assert values_in(mlflow_server.database, run) == values_logged(run)
    assert status_in(mlflow_server.database, run) == "FINISHED"
    survived(f"a server that takes {gateway.delay:g} s for each answer: {len(values_logged(run))} values, none lost")
    run.close()


def test_timeouts_follow_the_server() -> None:
    contact = Contact("http://127.0.0.1:1")

    def takes(seconds: float, is_answered: bool = True) -> float:
        contact._learn(seconds, math.ceil(contact.timeout), is_answered)
        return contact.timeout

    assert takes(2, False) == 4 and takes(4, False) == 8 and contact.is_silent
    assert takes(0.001, False) == 8 and not contact.is_silent, "it was refused at once: no matter of time"
    assert takes(7) == 21, "three times what the last answer took"
    assert takes(0.01) == 10.5 and takes(0.01) == 10, "halved at most, down to the least"
    for _ in range(10):
        takes(contact.timeout, False)
    assert contact.timeout == 300


def test_a_knock_takes_any_answer_for_one() -> None:
    gateway = Gateway(9)
    gateway.behaviour = refusing(302, b"")
    port = gateway.address.rpartition(":")[2]
    for uri in (gateway.address, f"https://127.0.0.1:{port}", f"postgresql://ann:pw@127.0.0.1:{port}/db"):
        Contact(uri).knock()
    gateway.close()
    for uri in ("databricks", "databricks://profile", "sqlite:////nowhere/mlflow.db"):
        Contact(uri).knock()
    for uri in (f"http://ann:s3cret@127.0.0.1:{port}/mlflow?x=1", "postgresql://ann:s3cret@127.0.0.1:9/db"):
        with pytest.raises(ConnectionError, match=r"^\w+://127.0.0.1:\d+[^ ]*: Connection refused$"):
            Contact(uri).knock()


def refusing(status: int, body: bytes, kind: str = "text/html") -> Behaviour:
    return lambda gateway, request, sent: (status, {"Content-Type": kind}, body)


def telling_what_it_got(gateway: Gateway, request: BaseHTTPRequestHandler, sent: bytes) -> Answer:
    return 401, {"Content-Type": "text/plain"}, f"not you: {request.headers['Authorization']}".encode()


@pytest.mark.parametrize(
    ("behaviour", "text"),
    [
        (telling_what_it_got, "401"),
        (refusing(403, b'{"error_code": "PERMISSION_DENIED", "message": "no"}', "application/json"), "PERMISSION"),
        (refusing(500, b"<html>" + 200_000 * b"x" + b"</html>"), "500"),
        (refusing(200, b"<html>Please log in</html>"), "Please log in"),
        (refusing(404, b"<html>no such page</html>"), "404"),
        (refusing(400, b"<html>bad request</html>"), "400"),
    ],
)
def test_a_server_that_refuses_everything_is_told_once_and_gets_all_later(
    tmp_path: Path,
    gateway: Gateway,
    mlflow_server: MlflowServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    behaviour: Behaviour,
    text: str,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "s3cret")
    run, _ = start(tmp_path, gateway.address)
    log(run, 1, 20)
    mirror = Mirror(MirroredRun(run), order_of(run, gateway.address))
    assert mirror.send(time.monotonic() + 60)
    gateway.behaviour = behaviour
    log(run, 21, 40)
    for _ in range(3):
        assert not mirror.send(time.monotonic() + 60)
    state = (run.path / "tracking.json").read_text()
    assert text in json.loads(state)["last_error"] and len(json.loads(state)["last_error"]) < 400
    assert mirror.count_pending() == 40
    gateway.behaviour = lambda gateway, request, sent: None
    assert mirror.drain("finished", 60)
    assert values_in(mlflow_server.database, run) == values_logged(run)
    told = capsys.readouterr().err
    assert sum(text in line for line in told.splitlines()) <= 2, "once for metrics, once for files"
    assert "goes on after 3 failed attempts" in told and len(told) < 6000
    for secret in ("s3cret", "YW5uOnMzY3JldA=="):
        assert secret not in told and secret not in state
    run.close()


def no_such_values(gateway: Gateway, request: BaseHTTPRequestHandler, sent: bytes) -> Answer | None:
    """As a server answers whose database takes no NaN, and which doesn't like one name."""
    if not request.path.endswith("/log-batch"):
        return None
    metrics = json.loads(sent).get("metrics", [])
    if any(metric["value"] == "NaN" or metric["key"] == "train/odd" for metric in metrics):
        body = {"error_code": "INVALID_PARAMETER_VALUE", "message": "Invalid value for parameter 'metrics'"}
        return 400, {"Content-Type": "application/json"}, json.dumps(body).encode()
    return None


def test_a_metric_that_is_refused_costs_a_few_calls_and_takes_nothing_with_it(
    tmp_path: Path, gateway: Gateway, mlflow_server: MlflowServer, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.behaviour = no_such_values
    run, tracker = start(tmp_path, gateway.address)
    for step in range(1, 401):
        loss = math.nan if step % 100 == 0 else 1 / step
        run.log({"step": step, "time": 1e9 + step, "train/loss": loss, "train/odd": 1.0, "lr": 0.1})
    tracker.start()
    run.end_attempt("finished")
    warning = tracker.finish("finished", 60)
    assert warning == "MLflow refused 404 values of train/loss, train/odd; metrics.jsonl has them"
    taken = [value for value in values_logged(run) if value[0] != "train/odd" and value[2] != "nan"]
    assert values_in(mlflow_server.database, run) == taken and len(taken) == 796
    assert sum(path.endswith("/log-batch") for path in gateway.requests) < 60
    assert read_state(run.path)["state"] == "done" and not is_unsent(run)
    done = sync(str(run.path), cwd=tmp_path)
    assert done.returncode == 0 and warning in done.stderr, "what is refused today will be refused tomorrow"
    run.close()


def test_a_run_that_is_deleted_meanwhile_is_not_taken_for_refused_values(
    tmp_path: Path, gateway: Gateway, mlflow_server: MlflowServer
) -> None:
    run, _ = start(tmp_path, gateway.address)
    log(run, 1, 10)
    mirror = Mirror(MirroredRun(run), order_of(run, gateway.address))
    assert mirror.send(time.monotonic() + 60)
    client_of(gateway.address).delete_run(mirror.state["mlflow_run_id"])
    log(run, 11, 20)
    assert not mirror.send(time.monotonic() + 60)
    assert "was deleted" in mirror.state["last_error"] and mirror.state["refused"] == 0
    assert mirror.drain("finished", 60)
    found = client_of(gateway.address).get_metric_history(mirror.state["mlflow_run_id"], "train/loss")
    assert [point.step for point in found] == list(range(1, 21))
    run.close()


HOLES = [accepting_and_silent, dropping_connections]


@pytest.mark.parametrize("hole", HOLES)
def test_a_black_hole_does_not_hold_the_end_of_a_training(
    tmp_path: Path, hole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with hole() as address:
        run, tracker = start(tmp_path, address)
        tracker.start()
        log(run, 1, 100)
        wait_until(tracker.problem, "the news that nobody answers", LONG)
        assert "gives no answer within" in str(tracker.problem())
        log(run, 101, 30_000)
        run.end_attempt("finished")
        begin = time.monotonic()
        warning = tracker.finish("finished")
        assert time.monotonic() - begin < 2.5, "half a second, and what it takes to count on a busy machine"
        assert warning is not None and warning.startswith(f"MLflow: 60000 values were not sent ({address} gives no ")
        assert warning.endswith(f"send the rest with: trainer runs sync {run.path}")
        assert not mirrors_of(run)
        run.close()


@pytest.mark.parametrize("hole", HOLES)
def test_a_training_ends_beside_a_black_hole_and_leaves_no_process(
    tmp_path: Path, hole: Any, server: ForkServer
) -> None:
    config = toy_config(tmp_path, tracking={"enabled": True})
    with hole() as address:
        training = server.run("fit", "--config", str(config), cwd=tmp_path, MLFLOW_TRACKING_URI=address)
        ended = time.time()
    assert training.wait() == [0], training.log()
    (record,) = tmp_path.glob("runs/*/*/run.json")
    run = Run(record.parent)
    assert run.record["status"] == "finished" and not mirrors_of(run)
    assert ended - record.stat().st_mtime < 5, "a mirror that is just starting may take a second to hear of the end"
    values = len(values_logged(run))
    assert values > 50 and f"MLflow: {values} values were not sent" in training.log()
    assert "trainer runs sync" in training.log() and training.log().count("MLflow: ") == 1


def test_a_server_that_falls_silent_in_the_end_holds_nobody_for_long(tmp_path: Path, gateway: Gateway) -> None:
    run, tracker = start(tmp_path, gateway.address)
    tracker.start()
    log(run, 1, 10)
    wait_until(lambda: read_state(run.path).get("state") == "sending", "the first values", LONG)
    gateway.delay = 300
    log(run, 11, 20)
    begin = time.monotonic()
    warning = tracker.finish("finished")
    assert 3 < time.monotonic() - begin < 12
    assert warning is not None and "20 values were not sent (no answer within" in warning and not mirrors_of(run)
    run.close()


def test_a_full_disk_under_the_run_keeps_nothing_from_mlflow(tmp_path: Path, database: Path) -> None:
    (tmp_path / "store").mkdir()
    file = Path(shutil.copy(database, tmp_path / "store" / "mlflow.db"))
    with small_disk(tmp_path / "small", "1m") as disk:
        run, tracker = start(disk, f"sqlite:///{file}")
        log(run, 1, 200)
        filler = fill(disk)
        tracker.start()
        wait_until(lambda: len(values_in(file, run)) == 400, "all values", LONG, 0.1)
        assert tracker.problem() is None and read_state(run.path) == {}
        filler.unlink()
        log(run, 201, 300)
        fill(disk)
        assert tracker.finish("finished", 60) is None, "the mirror's last word doesn't need the disk"
        assert values_in(file, run) == values_logged(run) and status_in(file, run) == "FINISHED"
        run.close()


def test_a_full_disk_under_the_database_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_disk(tmp_path / "small", "8m") as disk:
        file = disk / "mlflow.db"
        filler = fill(disk)
        run, _ = start(tmp_path, f"sqlite:///{file}")
        log(run, 1, 200)
        mirror = Mirror(MirroredRun(run), order_of(run, f"sqlite:///{file}"))
        for _ in range(2):  # no room for the tables
            assert not mirror.send(time.monotonic() + 60)
        assert mirror.count_pending() == 400
        filler.unlink()
        assert mirror.send(time.monotonic() + 60), mirror.state
        filler = fill(disk)
        log(run, 201, 2000)
        for _ in range(2):
            assert not mirror.send(time.monotonic() + 60)
        assert "full" in mirror.state["last_error"] and read_state(run.path)["last_error"] == mirror.state["last_error"]
        filler.unlink()
        assert mirror.drain("finished", 60)
        assert values_in(file, run) == values_logged(run)
        told = re.findall(r"^\d+-\d+-\d+ \S+ (.*)$", capsys.readouterr().err, re.MULTILINE)
        over = [index for index, line in enumerate(told) if line.startswith("goes on after 2 failed")]
        assert len(over) == 2 and over[-1] == len(told) - 1, "two outages, and that each is over"
        for outage in (told[: over[0]], told[over[0] + 1 : over[1]]):
            # A file that is old enough to be stored by now fails with an error of its own
            assert outage and len(outage) == len(set(outage)), "each error once"
        run.close()


TRAINING = """
import sys, time
from trainer.load import load
from trainer.run import Run
from trainer.tracking import Tracker
config = load(sys.argv[1])
run = Run.create(config, 1, "")
Tracker(run, config.tracking).start()
for step in range(1, 101):
    run.log({"step": step, "time": 1e9 + step, "train/loss": 1.0 / step})
print(run.path, flush=True)
time.sleep(300)
"""


def training_of(folder: Path, uri: str) -> tuple[subprocess.Popen[str], Run]:
    """A process that works on a run, and has logged its first values."""
    path = toy_config(folder, tracking={"enabled": True, "uri": uri, "tags": {"team": "vision"}})
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(path)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout as told:
        return process, Run.open(told.readline().strip())


def dead_node(folder: Path, uri: str, database: Path) -> Run:
    """A run whose training and mirror were killed together, some time after its first values were sent."""
    process, run = training_of(folder, uri)
    wait_until(lambda: values_in(database, run), "its first values", LONG, 0.1)
    (mirror,) = mirrors_of(run)
    for number in (process.pid, mirror.pid):
        os.kill(number, signal.SIGSTOP)
    log(run, 101, 200)
    for number in (process.pid, mirror.pid):
        os.kill(number, signal.SIGKILL)
    process.wait()
    mirror.wait(10)
    run.close()
    return run


def test_a_mirror_beside_a_black_hole_does_not_outlive_a_killed_training_for_long(tmp_path: Path) -> None:
    with accepting_and_silent() as address:
        process, run = training_of(tmp_path, address)
        wait_until(lambda: mirrors_of(run), "the mirror")
        process.kill()
        process.wait()
        # A container's first process may leave it a zombie for a while, which has no command line any more
        wait_until(lambda: not mirrors_of(run), "the mirror's end", 40, 0.1)
    assert run.record["status"] == "killed" and is_unsent(run)
    assert read_state(run.path)["pending"] == 100


def test_the_next_training_ends_in_mlflow_what_a_dead_node_left(tmp_path: Path, database: Path) -> None:
    file = Path(shutil.copy(database, tmp_path / "mlflow.db"))
    uri = f"sqlite:///{file}"
    dead = dead_node(tmp_path, uri, file)
    assert status_in(file, dead) == "RUNNING" and dead.status == "killed" and is_unsent(dead)
    living, _ = start(tmp_path, uri)  # another training, on another node perhaps
    Mirror(MirroredRun(living), order_of(living, uri)).send(time.monotonic() + 60)

    run, tracker = start(tmp_path, uri)
    tracker.start()
    log(run, 1, 50)
    wait_until(lambda: status_in(file, dead) == "KILLED", "the end of the dead run", LONG, 0.1)
    assert values_in(file, dead) == values_logged(dead)
    wait_until(lambda: read_state(dead.path)["state"] == "done", "the end of the dead run", LONG, 0.1)
    assert not is_unsent(dead)
    run.end_attempt("finished")
    assert tracker.finish("finished", 60) is None
    assert values_in(file, run) == values_logged(run) and status_in(file, run) == "FINISHED"
    assert status_in(file, living) == "RUNNING"
    connection = sqlite3.connect(file)
    (end,) = connection.execute("SELECT end_time FROM runs WHERE name = ?", (dead.id,)).fetchone()
    connection.close()
    assert abs(end - 1000 * (dead.path / "metrics.jsonl").stat().st_mtime) < 1000, "when it died, not when it was found"

    # It is gone on with: the same MLflow run, which runs again
    dead.begin_attempt(1)
    log(dead, 201, 210)
    again = Mirror(MirroredRun(dead), order_of(dead, uri))
    assert again.send(time.monotonic() + 60)
    assert status_in(file, dead) == "RUNNING"
    assert again.drain("finished", 60)
    assert status_in(file, dead) == "FINISHED" and values_in(file, dead) == values_logged(dead)
    for each in (run, dead, living):
        each.close()


def test_sync_without_a_run_sends_all_that_is_unsent(tmp_path: Path, database: Path) -> None:
    file = Path(shutil.copy(database, tmp_path / "mlflow.db"))
    uri = f"sqlite:///{file}"
    dead, _ = start(tmp_path, uri)
    log(dead, 1, 10)
    Mirror(MirroredRun(dead), order_of(dead, uri)).send(time.monotonic() + 60)
    log(dead, 11, 20)
    dead.update(process_started=1)  # as if this process were another one with the same number
    never_mirrored, _ = start(tmp_path, uri)
    log(never_mirrored, 1, 10)
    never_mirrored.end_attempt("failed", "ValueError")
    untracked, _ = start(tmp_path, uri, enabled=False)
    untracked.end_attempt("finished")
    running, _ = start(tmp_path, uri)
    assert (dead.status, status_in(file, dead)) == ("killed", "RUNNING")

    done = sync("--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {row["run_id"] for row in json.loads(done.stdout)["runs"]} == {dead.id, never_mirrored.id}
    assert (status_in(file, dead), status_in(file, never_mirrored)) == ("KILLED", "FAILED")
    for run in (dead, never_mirrored):
        assert values_in(file, run) == values_logged(run)
        run.close()
    assert not any(map(is_unsent, (dead, never_mirrored, untracked, running)))


def test_sync_asks_a_server_that_is_down_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", "sync"]) == 0
    assert capsys.readouterr().out == "all runs in runs/ are in MLflow\n"
    for _ in range(3):
        run, _ = start(tmp_path, "http://127.0.0.1:9")
        log(run, 1, 10)
        run.end_attempt("finished")
        run.close()
    begin = time.monotonic()
    assert cli.main(["runs", "sync", "--wait", "1"]) == 1
    assert time.monotonic() - begin < 8
    told = capsys.readouterr().err
    assert "3 of 3 runs were not sent; MLflow: 20 values were not sent (http://127.0.0.1:9: Connection refused)" in told

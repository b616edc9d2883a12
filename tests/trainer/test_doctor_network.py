"""`trainer doctor`: interfaces, names, and MLflow at every kind of address."""

from __future__ import annotations

import json
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from faults import only, status
from harness import environment, toy_config
from mlflow_servers import MlflowServer, accepting_and_silent

from trainer.doctor import Check, Probe, Setting, examine
from trainer.doctor import mlflow as doctor_mlflow
from trainer.doctor import network as doctor_network
from trainer.load import load
from trainer.world import World


@pytest.mark.parametrize(
    ("variable", "value", "is_good"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", True),
        ("GLOO_SOCKET_IFNAME", "eth0,ib0", True),
        ("GLOO_SOCKET_IFNAME", "eth", False),
        ("GLOO_SOCKET_IFNAME", "eth0,ib1", False),
        ("NCCL_SOCKET_IFNAME", "eth", True),
        ("NCCL_SOCKET_IFNAME", "=eth", False),
        ("NCCL_SOCKET_IFNAME", "=eth0", True),
        ("NCCL_SOCKET_IFNAME", "^docker,lo", True),
        ("NCCL_SOCKET_IFNAME", "^lo,eth,ib", False),
        ("NCCL_SOCKET_IFNAME", "^=eth", True),
        ("NCCL_SOCKET_IFNAME", "", True),
    ],
)
def test_variables_that_name_no_interface_are_noticed(variable: str, value: str, is_good: bool) -> None:
    assert (doctor_network.unmatched(variable, value, ["lo", "eth0", "ib0"]) is None) == is_good


def test_a_host_name_that_leads_nowhere_or_to_itself_only_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("MASTER_ADDR", "GLOO_SOCKET_IFNAME", "SLURM_JOB_NUM_NODES"):
        monkeypatch.delenv(variable, raising=False)
    nodes = Setting(Path("."), World(0, 2, 0, 1, launched=True))
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    assert status(doctor_network.names(Setting(Path(".")))) == "ok"
    check = only(doctor_network.names(nodes))
    assert check.status == "warning" and "other nodes would be told to connect to themselves" in check.found
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert status(doctor_network.names(nodes)) == "ok"
    monkeypatch.setattr(socket, "gethostname", lambda: "192.0.2.77")
    assert "no address of this machine" in only(doctor_network.names(nodes)).found


def test_a_host_whose_own_name_does_not_resolve_is_told() -> None:
    code = """
import json
from dataclasses import asdict
from pathlib import Path
from trainer.doctor import Setting
from trainer.doctor.network import names
from trainer.world import World
for world in (World(), World(0, 2, 0, 1, launched=True)):
    print(json.dumps(asdict(names(Setting(Path("."), world))[0])))
"""
    rename = 'hostname nobody-knows.invalid && exec "$@"'
    command = ["unshare", "--uts", "sh", "-c", rename, "sh", sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    if done.returncode and ("unshare" in done.stderr or "hostname" in done.stderr):
        pytest.skip(f"no namespace can be made here: {done.stderr}")
    alone, of_several = (json.loads(line) for line in done.stdout.splitlines())
    assert (alone["status"], of_several["status"]) == ("warning", "problem")
    assert alone["found"].startswith("nobody-knows.invalid, this host's name, does not resolve: ")


@contextmanager
def serving(code: int, body: bytes, pause: float = 0.0) -> Iterator[tuple[int, list[dict[str, str]]]]:
    """A server with one answer; its port, and the headers that it was sent."""
    heard: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append({"path": self.path, **dict(self.headers)})
            self.send_response(code)
            self.end_headers()
            for byte in body:
                self.wfile.write(bytes([byte]))
                time.sleep(pause)

        def log_message(self, *args: object) -> None:
            pass

        def handle(self) -> None:
            with suppress(OSError):  # the client has had enough, as it should
                super().handle()

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server.server_port, heard
    finally:
        threading.Thread(target=server.shutdown, daemon=True).start()


def mlflow_at(uri: str) -> list[Check]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        return doctor_mlflow.mlflow(Setting(Path("runs")))


def database(file: Path) -> list[Check]:
    return mlflow_at(f"sqlite:///{file}")


@pytest.mark.parametrize(
    ("code", "body", "expected", "said"),
    [
        (200, b"OK", "ok", "answers in "),
        (200, b"<html>Welcome!", "warning", "not as MLflow's /health"),
        (404, b"", "warning", "answers /health with status 404"),
        (401, b"", "problem", "refuses the credentials (status 401)"),
        (503, b"", "problem", "answers with status 503"),
    ],
)
def test_a_server_is_judged_by_its_answer(code: int, body: bytes, expected: str, said: str) -> None:
    with serving(code, body) as (port, heard):
        check = only(mlflow_at(f"http://me:hunter2@127.0.0.1:{port}/base/"))
    assert check.status == expected and said in check.found
    assert heard[0]["path"] == "/base/health"
    assert heard[0]["Authorization"] == "Basic bWU6aHVudGVyMg=="
    assert "hunter2" not in f"{check.found}{check.remedy}"


def test_a_server_that_never_ends_its_answer_holds_nobody() -> None:
    with serving(200, b"x" * 100, pause=0.2) as (port, _):
        started = time.monotonic()
        check = only(examine(Probe("MLflow", lambda: mlflow_at(f"http://127.0.0.1:{port}"), 0.6)))
        assert check.found == "no answer within 0.6 s" and time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("http://me:hunter2@127.0.0.1:1", "http://127.0.0.1:1: Connection refused"),
        ("https://127.0.0.1:1/x", "https://127.0.0.1:1/x: Connection refused"),
        ("http://nowhere.invalid", "http://nowhere.invalid: "),
        ("http://127.0.0.1:port", "the address is none: "),
        ("postgresql://me:hunter2@127.0.0.1:1/db", "postgresql://me@127.0.0.1:1/db: Connection refused"),
    ],
)
def test_an_address_where_nobody_is_is_a_problem(uri: str, said: str) -> None:
    check = only(mlflow_at(uri))
    assert check.status == "problem" and said in check.found
    assert "hunter2" not in f"{check.found}{check.remedy}"


def test_a_database_server_that_listens_is_ok() -> None:
    with accepting_and_silent() as address:
        uri = f"{address.replace('http://', 'postgresql://me:hunter2@')}/db"
        assert "takes connections" in only(mlflow_at(uri)).found
    assert status(mlflow_at("databricks")) == "warning"


def test_a_file_is_a_database_or_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "will be made by the first run" in only(database(tmp_path / "not" / "there" / "mlflow.db")).found
    (tmp_path / "text.db").write_text("these are not the bytes of a database, however many there are of them\n" * 20)
    check = only(database(tmp_path / "text.db"))
    assert check.status == "problem" and "file is not a database" in check.found
    with sqlite3.connect(tmp_path / "good.db") as connection:
        connection.execute("CREATE TABLE runs (id)")
    assert "a database of 1 tables" in only(database(tmp_path / "good.db")).found
    monkeypatch.setattr(doctor_mlflow, "BUSY_SECONDS", 0.1)
    connection.execute("BEGIN EXCLUSIVE")
    assert "held by another program" in only(database(tmp_path / "good.db")).found
    connection.close()


def test_a_run_without_tracking_needs_no_mlflow(tmp_path: Path) -> None:
    config = load(toy_config(tmp_path, tracking={"enabled": False, "uri": "http://127.0.0.1:1"}))
    assert status(doctor_mlflow.mlflow(Setting(tmp_path, config=config))) == "ok"


def test_a_folder_is_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "/some/mlruns")
    check = only(doctor_mlflow.mlflow(Setting(Path("runs"))))
    assert check.status == "problem" and "MLflow keeps no runs in folders" in check.found


def test_a_real_mlflow_server_is_recognised(tmp_path: Path) -> None:
    server = MlflowServer(tmp_path / "server")
    server.start()
    try:
        assert only(mlflow_at(server.address)).found.startswith(f"{server.address} answers in ")
    finally:
        server.kill()
    assert "Connection refused" in only(mlflow_at(server.address)).found

"""`trainer deploy` as a user types it: bundles that the front serves itself."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import front_bundles
import pytest
from mlflow import MlflowClient
from processes import wait_until
from rollouts import Clients, alive, ended

from trainer.local_ranks import free_port

Trainer = Callable[..., CompletedProcess[str]]
PLAN = """
steps:
  - {percent: 50, seconds: 0.5, requests: 40}
  - {percent: 100, seconds: 0.2, requests: 20}
limits: {p95_ms: 60000}
margins: {latency: 20}
"""


class Deployment:
    """One, by the command line."""

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self._trainer, self.folder, self.port = trainer, folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def do(self, action: str, *args: str, code: int = 0) -> str:
        done = self._trainer("deploy", action, *args, cwd=self.folder)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def run(self, *args: str) -> int:
        """Start the front in the background; its process."""
        pid: int = json.loads(self.do("run", "d", *args, "--background", "--json"))["pid"]
        return pid

    def status(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.do("status", "d", "--json"))
        return told


@pytest.fixture
def deployment(trainer: Trainer, tmp_path: Path) -> Iterator[Deployment]:
    made = Deployment(trainer, tmp_path)
    yield made
    lock = tmp_path / "deployments" / "d" / ".lock"
    if lock.exists() and alive(pid := int(lock.read_text() or 0)):
        os.kill(pid, signal.SIGTERM)
        ended(pid, 60)


class Digits(Clients):
    """Clients that send pictures."""

    def body(self, number: int) -> dict[str, Any]:
        return {"instances": [[[number % 256] * 8] * 8]}


@pytest.fixture
def bundles(tmp_path: Path) -> list[Path]:
    """Two versions of the same model."""
    return [front_bundles.digits(tmp_path / name, name).path for name in ("one", "two")]


def test_bundles_from_run_to_promotion_over_a_kill(deployment: Deployment, bundles: list[Path], tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN)
    front = deployment.run(str(bundles[0]), "--port", str(deployment.port), "--serve=--threads 1")
    first = deployment.status()["versions"]["old"]
    assert first["ready"] and alive(first["pid"])

    os.kill(front, signal.SIGKILL)
    ended(front)
    ended(first["pid"])  # no server outlives its front
    assert "not running" in deployment.do("status", "d")
    again = deployment.run()
    assert again != front and deployment.status()["versions"]["old"]["version"] == first["version"]

    clients, enough = Digits(deployment.url, 4), threading.Event()
    load = threading.Thread(target=clients.run, args=(enough.is_set,), kwargs={"deadline": 200.0})
    load.start()
    try:
        said = deployment.do("start", "d", str(bundles[1]), "--plan", "plan.yaml", "--wait")
    finally:
        enough.set()
        load.join()
    assert "promote: " in said
    assert clients.statuses.keys() == {200} and not clients.lost and clients.arms["new"]
    log = deployment.do("log", "d")
    assert "golden requests: 8 of 8 as in training" in log and "takes all traffic" in log

    second = deployment.status()["versions"]["old"]
    assert second["version"] != first["version"]
    assert "is the version that runs already" in deployment.do("start", "d", str(bundles[1]), code=2)
    assert "back to" in deployment.do("rollback", "d")
    wait_until(lambda: not alive(second["pid"]), "the end of the version that was taken back", 60, 0.05)
    assert deployment.status()["versions"]["old"]["version"] == first["version"]
    deployment.do("stop", "d")
    ended(again)


def test_the_alias_of_the_registry_follows(deployment: Deployment, bundles: list[Path], tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.create_registered_model("m")
    run = client.create_run(client.create_experiment("e")).info.run_id
    tags = {"trainer.lineage": "abc", "trainer.checkpoint": "step-00000001"}
    client.create_model_version(
        "m", f"runs:/{run}/nine", run_id=run, tags={**tags, "trainer.checkpoint": "step-00000009"}
    )
    client.create_model_version("m", f"runs:/{run}/one", run_id=run, tags=tags)
    event = {
        "event": "promoted",
        "source": "x",
        "version": "v",
        "run": {"lineage": "abc", "checkpoint": "step-00000001"},
    }
    where = ("--alias", "champion", "--registered-model", "m", "--tracking-uri", uri)
    assert "models:/m@champion is version 2" in deployment.do("alias", *where, json.dumps(event))
    assert client.get_model_version_by_alias("m", "champion").version in (2, "2")
    event["run"] = {"id": "r", "lineage": "abc", "checkpoint": "step-00000005"}
    assert "trainer runs register r --name m" in deployment.do("alias", *where, json.dumps(event), code=2)
    secret = ("--alias", "a", "--registered-model", "m", "--tracking-uri", "https://me:secret@host")
    said = deployment.do("run", "d", str(bundles[0]), *secret, code=2)
    assert "MLFLOW_TRACKING_URI" in said and "secret" not in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("strategie: canary", "unknown key 'strategie', did you mean 'strategy'?"),
        ("strategy: cannary", "did you mean 'canary'?"),
        ("steps: [{percent: 120}]", "percent: got 120, wanted 0 to 100"),
        ("steps: [{percent: 50}, {percent: 10}]", "must not fall"),
        ("steps: [{percent: ten}]", r"steps\[0\]: percent: got 'ten', wanted a number"),
        ("limits: {errors: 5}", "wanted a share between 0 and 1"),
        ("split: {sticky: user}", "wanted client, api-key, header:NAME or cookie:NAME"),
        ("margins: {errors: 0.1}\nmargins: {errors: 0.2}", "'margins' is given twice"),
        ("strategy: shadow\nsteps: [{percent: 10}]", "a shadow answers nobody"),
        ("- 1", "wanted keys and values"),
        ("a: [", "not YAML"),
    ],
)
def test_mistakes_in_a_plan_are_told(tmp_path: Path, text: str, said: str) -> None:
    from serving.errors import Mistake
    from serving.rollout.plan import load

    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(Mistake, match=said) as caught:
        load(tmp_path / "plan.yaml")
    assert re.match(f"{re.escape(str(tmp_path))}/plan.yaml", str(caught.value)) and "\n" not in str(caught.value)


def test_mistakes_on_the_command_line_are_told(deployment: Deployment) -> None:
    assert "no bundle" in deployment.do("run", "d", "nowhere", code=2)
    assert "name the bundle to begin with" in deployment.do("run", "d", code=2)
    assert "wanted a name" in deployment.do("run", "../d", "http://127.0.0.1:1", code=2)
    assert "trainer deploy run d" in deployment.do("promote", "d", code=2)

"""`trainer runs`: looking at runs, finding the best, registering it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from harness import toy_config

from trainer import checkpoint, cli
from trainer.environment import process_started
from trainer.load import load
from trainer.mirror import Mirror
from trainer.mirrored import MirroredRun
from trainer.run import Run
from trainer.tracking import MLFLOW_ENVIRONMENT, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for key, value in MLFLOW_ENVIRONMENT.items():
        monkeypatch.setenv(key, value)


def make_run(folder: Path, accuracies: list[float], status: str = "finished", **sections: Any) -> Run:
    run = Run.create(load(toy_config(folder, **sections)), 1, "")
    for step, accuracy in enumerate(accuracies, start=1):
        run.log(
            {"step": 10 * step, "epoch": float(step), "time": 1e9, "val/accuracy": accuracy, "train/loss": 1 / step}
        )
    run.close()
    if status != "running":
        run.end_attempt(status)
    return run


def save(run: Run, step: int, metrics: dict[str, float]) -> Path:
    unfinished = checkpoint.unfinished_folder(run.checkpoints, step)
    unfinished.mkdir(parents=True)
    weights = unfinished / "model.safetensors"
    weights.write_bytes(step.to_bytes(8, "little"))
    numbers = unfinished / "state.json"
    numbers.write_text("{}")
    files = {f.name: {"sha256": checkpoint.hash_file(f), "size": f.stat().st_size} for f in (weights, numbers)}
    manifest = checkpoint.Manifest(step, 10 * step, 1, False, metrics, files)
    return checkpoint.publish(unfinished, manifest)


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """What `trainer runs ... --json` prints."""
    capsys.readouterr()
    code = cli.main(["runs", *arguments, "--json"])
    said = capsys.readouterr()
    assert code == 0, said.err
    return json.loads(said.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def refuse(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """The one line with which `trainer runs ...` refuses."""
    capsys.readouterr()
    assert cli.main(["runs", *arguments]) == code
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1, said.err
    return said.err


def test_an_empty_folder_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", "list"]) == 0
    assert capsys.readouterr().out == "no runs in runs/ yet; start one with: trainer fit --config quickstart.yaml\n"
    assert ask(capsys, "list", "--runs-dir", "elsewhere") == {"runs": []}
    assert "no run has logged any" in refuse(capsys, "best", "--metric", "val/accuracy")


def test_list_shows_how_runs_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished = make_run(tmp_path, [0.5, 0.6])
    running = make_run(tmp_path, [0.5], "running")
    killed = make_run(tmp_path, [], "running", name="other")
    killed.update(process_started=1)
    damaged = make_run(tmp_path, [0.1])
    (damaged.path / "run.json").write_text("{")
    shown = {row["run_id"]: (row["name"], row["status"], row["step"]) for row in ask(capsys, "list")["runs"]}
    assert shown == {
        finished.id: ("toy", "finished", 20),
        running.id: ("toy", "running", 10),
        killed.id: ("other", "killed", None),
        damaged.id: ("toy", "damaged", 10),
    }
    assert [row["run_id"] for row in ask(capsys, "list", "--name", "other")["runs"]] == [killed.id]
    assert cli.main(["runs", "list"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["experiment", "run", "status", "started", "(UTC)", "step"] and len(lines) == 4
    assert any(line.split()[:3] == ["toy", damaged.id, "damaged"] for line in lines)
    assert cli.main(["runs", "list", "--name", "nothing"]) == 0
    assert capsys.readouterr().out.startswith("no runs of nothing in runs/ yet")


def test_show_tells_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, [0.5, math.nan, 0.8, 0.7])
    save(run, 30, {"val/accuracy": 0.8})
    shown = ask(capsys, "show", run.id)
    assert shown["status"] == "finished" and shown["checkpoints"] == ["step-00000030"]
    assert shown["metrics"]["val/accuracy"] == {"last": 0.7, "step": 40, "min": 0.5, "max": 0.8}
    assert shown["lineage"] == run.record["lineage"]
    assert cli.main(["runs", "show", str(run.path)]) == 0
    text = capsys.readouterr().out
    assert str(run.path) in text and "step-00000030" in text and run.record["lineage"]["id"] in text
    assert ["val/accuracy", "0.7", "0.5", "0.8"] in [line.split() for line in text.splitlines()]
    broken = make_run(tmp_path, [math.nan])
    assert ask(capsys, "show", broken.id)["metrics"]["val/accuracy"]["last"] is None
    assert "neither a run directory nor the id of a run" in refuse(capsys, "show", "nothing")


def test_best_ranks_runs_by_their_best_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = make_run(tmp_path, [0.5, 0.9, math.nan, 0.7, 0.9])
    fair = make_run(tmp_path, [0.6, math.inf, 0.8])
    make_run(tmp_path, [math.nan])
    other = make_run(tmp_path, [0.99], name="other")
    answer = ask(capsys, "best", "--metric", "val/accuracy", "--name", "toy")
    assert answer["mode"] == "max"
    assert (answer["best"]["run_id"], answer["best"]["value"], answer["best"]["step"]) == (good.id, 0.9, 20)
    assert [row["run_id"] for row in answer["runs"]] == [good.id, fair.id]
    assert ask(capsys, "best", "--metric", "val/accuracy")["best"]["run_id"] == other.id
    worst = ask(capsys, "best", "--metric", "val/accuracy", "--mode", "min", "--name", "toy")
    assert (worst["best"]["run_id"], worst["best"]["value"]) == (good.id, 0.5)
    loss = ask(capsys, "best", "--metric", "train/loss")
    assert loss["mode"] == "min" and loss["best"]["value"] == 1 / 5
    assert cli.main(["runs", "best", "--metric", "val/accuracy", "--name", "toy"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["0.9", "20", "finished", str(good.path.relative_to(tmp_path))]


def test_best_names_the_metrics_that_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, [0.5])
    line = refuse(capsys, "best", "--metric", "val/acuracy")
    assert line.endswith("no run in runs/ has it; those there are: train/loss, val/accuracy\n")


def test_best_leaves_out_what_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, damaged = make_run(tmp_path, [0.5]), make_run(tmp_path, [0.9])
    metrics = damaged.path / "metrics.jsonl"
    metrics.write_bytes(b"\0\0\n" + metrics.read_bytes())
    assert cli.main(["runs", "best", "--metric", "val/accuracy", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["best"]["run_id"] == good.id
    assert said.err.startswith("trainer: warning: left out: ") and "metrics.jsonl:1: damaged line" in said.err


def mirror(run: Run) -> MlflowClient:
    """Send a run to MLflow, as its mirror does, from this process."""
    uri = tracking_uri(run.config().tracking, run.path.parent.parent)
    order = {"uri": uri, "experiment": "toy", "tags": {}, "system_metrics": False}
    assert Mirror(
        MirroredRun(run), {**order, "pid": os.getpid(), "process_started": process_started(os.getpid())}
    ).drain("finished", 90)
    from mlflow import MlflowClient  # within a test, so that it finds the settings above

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def test_register_takes_the_best_checkpoint_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, [0.7, 0.9, 0.8], checkpoint={"monitor": "val/accuracy"})
    assert "no whole checkpoint to register" in refuse(capsys, "register", run.id, "--name", "digits")
    for step, accuracy in ((10, 0.7), (20, 0.9), (30, 0.8)):
        save(run, step, {"val/accuracy": accuracy})
    assert "not in MLflow yet; send it there with: trainer runs sync" in refuse(
        capsys, "register", run.id, "--name", "digits"
    )
    client = mirror(run)

    answer = ask(capsys, "register", run.id, "--name", "digits", "--alias", "champion")
    assert (answer["version"], answer["step"], answer["metrics"]) == ("1", 20, {"val/accuracy": 0.9})
    champion = client.get_model_version_by_alias("digits", "champion")
    assert str(champion.version) == "1" and champion.run_id == run.record["mlflow_run_id"]
    assert champion.tags["trainer.lineage"] == run.record["lineage"]["id"] and champion.tags["val/accuracy"] == "0.9"
    from mlflow.artifacts import download_artifacts

    source = client.get_model_version_download_uri("digits", "1")
    stored = Path(download_artifacts(source, dst_path=str(tmp_path), tracking_uri=client.tracking_uri))
    assert (stored / "model.safetensors").read_bytes() == (20).to_bytes(8, "little")
    assert (stored / "config.yaml").read_text() == (run.path / "config.yaml").read_text()
    checkpoint.verify(checkpoint.read(stored))

    # The same checkpoint again: only the alias moves
    assert cli.main(["runs", "register", run.id, "--name", "digits", "--alias", "live"]) == 0
    assert "models:/digits@live is" in capsys.readouterr().out
    assert len(client.search_model_versions("name = 'digits'")) == 1
    save(run, 40, {"val/accuracy": 0.95})
    assert ask(capsys, "register", run.id, "--name", "digits", "--alias", "champion")["version"] == "2"
    assert str(client.get_model_version_by_alias("digits", "champion").version) == "2"
    assert str(client.get_model_version_by_alias("digits", "live").version) == "1"

    line = refuse(capsys, "register", run.id, "--name", "digits", "--alias", "v1")
    assert "alias" in line and "v1" in line
    (run.checkpoints / "step-00000040" / "model.safetensors").write_bytes(b"something")
    assert "step-00000040 is damaged" in refuse(capsys, "register", run.id, "--name", "digits", code=1)
    config = run.path / "config.yaml"
    config.write_text(config.read_text().replace("monitor: val/accuracy", "monitor: null"))
    assert "not http://elsewhere; set MLFLOW_TRACKING_URI" in at_elsewhere(capsys, run)
    assert ask(capsys, "register", run.id, "--name", "digits")["step"] == 30, "the newest that is whole"


def at_elsewhere(capsys: pytest.CaptureFixture[str], run: Run) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
        return refuse(capsys, "register", run.id, "--name", "digits")


def test_sync_leaves_a_running_run_to_its_own_mirror(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, [0.5], "running")
    assert "still running" in refuse(capsys, "sync", run.id)


def test_sync_says_when_it_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, [0.5])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr("trainer.tracking.SILENT_SECONDS", 0.0)
    assert cli.main(["runs", "sync", run.id, "--wait", "0.5"]) == 1
    waiting, line = capsys.readouterr().err.splitlines()
    assert waiting.startswith("sending the rest to MLflow (at most ")
    assert "MLflow: " in line and line.endswith(f"trainer runs sync {run.path.relative_to(tmp_path)}")

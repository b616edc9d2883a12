"""`trainer tune` as a user has it: real Ray, real trainings, real kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import soak
import yaml
from processes import wait_until
from tuning import Search, directory, gist, results, search_config, shared_memory, trainings

from trainer.cli import main
from trainer.load import load


def test_a_search_leaves_what_it_found(tmp_path: Path) -> None:
    before = shared_memory()
    config = search_config(tmp_path, {"num_samples": 8})
    search = Search(tmp_path, "--config", str(config), "--json")
    told = json.loads(search.wait())
    search.is_gone()
    folder = directory(tmp_path)
    entries = results(folder)
    assert [entry["number"] for entry in entries] == list(range(8))
    assert {entry["state"] for entry in entries} <= {"finished", "pruned"}
    finished = [entry for entry in entries if entry["state"] == "finished"]
    best = min(finished, key=lambda entry: entry["values"][0])
    assert told["best"][0]["trial"] == best["number"]
    assert all(entry["seconds"]["train"] > 0 for entry in entries)
    # Pasting a trial's overrides trains it again, to the same bits.
    assert (
        main(["fit", "--config", str(folder / "best.yaml"), f"runs_dir={tmp_path / 'again'}", "train.threads=1"]) == 0
    )
    (again,) = (tmp_path / "again" / "toy").iterdir()
    (first,) = (folder / "trials" / f"t{best['number']:04d}").iterdir()
    losses = [[json.loads(line).get("val/loss") for line in (run / "metrics.jsonl").open()] for run in (again, first)]
    assert losses[0] == losses[1]
    assert "tune" not in yaml.safe_load((folder / "best.yaml").read_text())
    assert load(str(folder / "best.yaml")).optimizer.options["lr"] == best["params"]["optimizer.lr"]
    assert (folder / "report.html").stat().st_size > 100_000
    assert shared_memory() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_wish_to_stop_is_answered_and_resume_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    config = search_config(tmp_path, {"num_samples": 8, "scheduler": "none"}, data={"delay": 0.1})
    search = Search(tmp_path, "--config", str(config))
    search.wait_for(" finished: ")
    search.process.send_signal(number)
    search.wait(75)
    search.is_gone()
    folder = directory(tmp_path)
    assert f"go on with: trainer tune --resume {folder.relative_to(tmp_path)}" in search.log.replace(f"{tmp_path}/", "")
    assert json.loads((folder / "search.json").read_text())["status"] == "interrupted"
    ended = {entry["number"] for entry in results(folder)}
    assert 1 <= len(ended) < 8
    going_on = Search(tmp_path, "--resume", str(folder))
    going_on.wait()
    assert [entry["number"] for entry in results(folder)] == list(range(8))
    for name, states in trainings(folder).items():
        assert states == ["finished"], name
    for entry in results(folder):
        assert entry["attempts"] == (1 if entry["number"] in ended else entry["attempts"]) <= 2


@pytest.mark.soak
def test_a_driver_that_is_killed_again_and_again_comes_to_the_same_end(
    tmp_path: Path, survived: Callable[[str], None]
) -> None:
    kills, trials, delay = soak.choose(3, 20), soak.choose(12, 30), soak.choose(0.03, 0.5)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
        search_config(folder, {"num_samples": trials, "max_concurrent": 1}, data={"delay": delay}, seed=3)
    began = time.monotonic()
    undisturbed = Search(whole, "--config", "toy.yaml")
    wait_until(lambda: list(whole.glob("runs/toy/tune-*/trials/t0000/*/metrics.jsonl")), "the first trial")
    start_up = time.monotonic() - began
    undisturbed.wait()

    draw = soak.draw()
    search = Search(cut, "--config", "toy.yaml")
    for _ in range(kills):
        with suppress(subprocess.TimeoutExpired):  # some moments come before the first trial, most in the midst of one
            search.process.wait(draw.uniform(0.6, 1.5) * start_up)
        assert search.process.returncode is None, f"it ended before it was killed:\n{search.log}"
        search.kill()
        search.is_gone()
        begun = [path.parent for path in cut.glob("runs/toy/tune-*/search.json")]
        search = Search(cut, *(["--resume", str(begun[0])] if begun else ["--config", "toy.yaml"]))
    search.wait()
    search.is_gone()
    folder = directory(cut)
    assert len(results(folder)) == trials
    assert gist(folder) == gist(directory(whole))
    best = [yaml.safe_load((found / "best.yaml").read_text()) for found in (folder, directory(whole))]
    assert {**best[0], "runs_dir": ""} == {**best[1], "runs_dir": ""}
    # No trial was begun twice, let alone trained to its end twice.
    assert all(len(states) == 1 for states in trainings(folder).values())
    survived(f"driver of a search of {trials} trials: {kills} SIGKILLs")


@pytest.mark.parametrize("how", ["kill", "exit", "raise"])
def test_a_trial_that_dies_is_tried_again_and_one_that_raises_is_recorded(how: str, tmp_path: Path) -> None:
    """The recipe fails in its fourth step, on every attempt."""
    config = search_config(
        tmp_path,
        {
            "num_samples": 3,
            "scheduler": "none",
            "max_failures": 1,
            "space": {"recipe.at": {"choice": [4, 1000]}},
            "sampler": "grid",
        },
        recipe={"name": "toy.failing_recipe", "how": how},
    )
    search = Search(tmp_path, "--config", str(config))
    search.wait()
    search.is_gone()
    by_state = {entry["state"]: entry for entry in results(directory(tmp_path))}
    assert set(by_state) == {"finished", "failed"}
    failed = by_state["failed"]
    if how == "raise":
        assert failed["attempts"] == 1 and failed["error"] == "ValueError: the sky; is falling"
        assert "failing_recipe.py" in failed["traceback"]
    else:
        assert failed["attempts"] == 2 and failed["failures"] == 2
        assert ("SIGKILL" if how == "kill" else "exit code 3") in failed["error"]
    assert failed["error"] in search.log


def test_a_killed_worker_is_replaced_and_its_trial_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    config = search_config(
        tmp_path,
        {"num_samples": 2, "scheduler": "none", "max_concurrent": 1},
        data={"delay": 0.1},
        checkpoint={"every_steps": 2},
    )
    search = Search(tmp_path, "--config", str(config))
    folder = wait_until(lambda: next(iter(tmp_path.glob("runs/toy/tune-*")), None), "the search's folder")
    wait_until(lambda: list(folder.glob("trials/t0000/*/checkpoints/step-*")), "the first checkpoint")
    (worker,) = [pid for pid in search.pids() if b"ray::TrialWorker" in search.command(pid)]
    os.kill(worker, signal.SIGKILL)
    search.wait()
    search.is_gone()
    first, second = results(folder)
    assert (first["failures"], first["attempts"], second["attempts"]) == (1, 2, 1)
    (run,) = (folder / "trials" / "t0000").iterdir()
    log = (folder / "logs" / "t0000.log").read_text()
    assert "going on from step-" in log and json.loads((run / "run.json").read_text())["status"] == "finished"


def test_a_trial_may_be_a_job_of_two_processes(tmp_path: Path) -> None:
    config = search_config(tmp_path, {"num_samples": 2, "cpus_per_trial": 2, "processes_per_trial": 2})
    search = Search(tmp_path, "--config", str(config))
    search.wait()
    search.is_gone()
    assert "1 trial at once" in search.log
    runs = [json.loads(file.read_text()) for file in directory(tmp_path).glob("trials/*/*/run.json")]
    assert [run["world_size"] for run in runs] == [2, 2]
    assert [entry["state"] for entry in results(directory(tmp_path))].count("failed") == 0


def test_a_population_goes_on_from_each_others_checkpoints(tmp_path: Path) -> None:
    config = search_config(
        tmp_path,
        {"num_samples": 4, "scheduler": {"name": "pbt", "interval": 1}, "sampler": "random",
         "space": {"optimizer.lr": {"log_uniform": [1e-5, 1.0]}}, "keep_checkpoints": 1},
        train={"max_epochs": 6},
    )  # fmt: skip
    search = Search(tmp_path, "--config", str(config))
    search.wait()
    search.is_gone()
    folder = directory(tmp_path)
    entries = results(folder)
    assert [entry["state"] for entry in entries] == ["finished"] * 4
    assert any(entry["segment"] for entry in entries), "nobody took over from anybody"
    assert all(entry["reports"][-1]["epoch"] == 6 for entry in entries)
    holders = {path.parts[-4] for path in folder.glob("trials/*/*/checkpoints/step-*")}
    assert len(holders) == 1


def test_every_fold_counts(tmp_path: Path) -> None:
    config = search_config(
        tmp_path,
        {"num_samples": 4, "cross_validate": True, "scheduler": "median"},
        holdout={"method": "stratified", "folds": 3},
    )
    search = Search(tmp_path, "--config", str(config))
    search.wait()
    search.is_gone()
    for entry in results(directory(tmp_path)):
        losses = [fold["val/loss"] for fold in entry["folds"]]
        assert len(losses) == (3 if entry["state"] == "finished" else len(entry["reports"]))
        assert entry["values"][0] == pytest.approx(sum(losses) / len(losses))


@pytest.mark.parametrize("scheduler", ["hyperband", "median", "asha"])
def test_the_other_schedulers_end(scheduler: str, tmp_path: Path) -> None:
    config = search_config(tmp_path, {"num_samples": 5, "scheduler": scheduler})
    search = Search(tmp_path, "--config", str(config))
    search.wait()
    search.is_gone()
    assert len(results(directory(tmp_path))) == 5


@pytest.mark.parametrize(
    ("tune", "arguments", "message"),
    [
        ({"objective": {"val/f1": "max"}}, [], "tune.objective: no trial reports 'val/f1'; there are: val/accuracy"),
        ({}, ["--gpus-per-trial", "3"], "--gpus-per-trial 3: no node of the cluster has so many, the largest has 0"),
        ({}, ["--address", "127.0.0.1:1"], "--address 127.0.0.1:1: there is no Ray cluster"),
    ],
)
def test_what_only_the_cluster_can_tell_is_one_line(tune, arguments, message, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    config = search_config(tmp_path, tune)
    search = Search(tmp_path, "--config", str(config), *arguments)
    search.wait(2)
    search.is_gone()
    errors = [line for line in search.log.splitlines() if line.startswith("trainer: error")]
    assert len(errors) == 1 and message in errors[0]
    assert "Traceback" not in search.log


def test_nothing_is_left_behind_after_a_hundred_trials(tmp_path: Path) -> None:
    before = shared_memory()
    scratch = Path(tempfile.mkdtemp(dir="/tmp"))  # short: Ray's sockets are below it
    config = search_config(tmp_path, {"num_samples": 100, "sampler": "random"}, train={"max_epochs": 1})
    search = Search(tmp_path, "--config", str(config), TMPDIR=str(scratch))
    folder = wait_until(lambda: next(iter(tmp_path.glob("runs/toy/tune-*")), None), "the search's folder")
    trials = folder / "trials.jsonl"

    def ended() -> int:
        return len(trials.read_text().splitlines()) if trials.exists() else 0

    wait_until(lambda: ended() >= 20, "20 trials", pause=0.05)
    early, early_memory = len(search.pids()), shared_memory()
    wait_until(lambda: ended() >= 95, "95 trials", pause=0.05)
    assert len(search.pids()) <= early + 2  # a trial more or less
    assert len(shared_memory()) <= len(early_memory)
    search.wait()
    search.is_gone()
    assert shared_memory() == before
    assert len(results(folder)) == 100
    assert not list(scratch.glob("trainer-*")) and not list(scratch.glob("ray*"))
    shutil.rmtree(scratch)  # torch keeps a cache of its user there
    checkpoints = list(folder.glob("trials/*/*/checkpoints/step-*"))
    assert len(checkpoints) == 1


def test_a_search_goes_on_when_a_node_is_taken_away(tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=small)
    try:
        second = cluster.add_node(**small)
        config = search_config(
            tmp_path, {"num_samples": 8, "scheduler": "none"}, data={"delay": 0.1}, checkpoint={"every_steps": 2}
        )
        search = Search(tmp_path, "--config", str(config), "--address", cluster.address)
        search.wait_for(" finished: ")
        assert "2 trials at once" in search.log
        cluster.remove_node(second, allow_graceful=False)
        search.wait()
        search.is_gone()
    finally:
        cluster.shutdown()
    entries = results(directory(tmp_path))
    assert [entry["state"] for entry in entries] == ["finished"] * 8
    assert 1 <= sum(entry["failures"] for entry in entries) <= 2
    assert all(states == ["finished"] for states in trainings(directory(tmp_path)).values())


def test_the_best_are_repeated_and_the_winner_is_trained_on_all_there_is(tmp_path: Path) -> None:
    config = search_config(
        tmp_path,
        {"num_samples": 3, "cross_validate": True, "scheduler": "none"},
        holdout={"method": "k_fold", "folds": 2},
        train={"max_epochs": 1},
    )
    told = json.loads(Search(tmp_path, "--config", str(config), "--confirm", "2", "--retrain", "--json").wait())
    folder = directory(tmp_path)
    confirmed = told["confirmed"]
    assert [len(row["values"]) for row in confirmed["trials"]] == [5, 5] and confirmed["conclusion"]
    repeats = trainings(folder)
    assert sum(name.startswith("confirm-") for name in repeats) == 2 * 5 * 2
    # The retrained one has seen the samples of train and val together, and test once.
    retrained = told["retrained"]
    assert retrained["trial"] == confirmed["best"] and "test/loss" in retrained["metrics"]
    record = yaml.safe_load((Path(retrained["run"]) / "config.yaml").read_text())
    assert record["holdout"]["method"] == "none" and record["evaluate"]["test"]
    # Asked for again, nothing of it is trained again.
    again = json.loads(Search(tmp_path, "--resume", str(folder), "--confirm", "2", "--retrain", "--json").wait())
    assert again["confirmed"] == confirmed and again["retrained"] == retrained
    assert trainings(folder) == repeats


def test_a_wish_to_stop_after_the_search_is_answered_too(tmp_path: Path) -> None:
    config = search_config(tmp_path, {"num_samples": 2, "scheduler": "none"}, data={"delay": 0.1})
    search = Search(tmp_path, "--config", str(config), "--confirm", "2")
    search.wait_for("confirming: ")
    search.process.send_signal(signal.SIGINT)
    search.wait(75)
    search.is_gone()
    assert "go on with: trainer tune --resume" in search.log
    assert json.loads((directory(tmp_path) / "search.json").read_text())["status"] == "interrupted"


def test_what_is_no_search_can_not_be_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--resume", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"trainer: error: --resume {tmp_path / 'none'}: no such directory\n"
    (tmp_path / "toy" / "tune-1").mkdir(parents=True)
    (tmp_path / "toy" / "tune-1" / "search.json").write_text("{}")
    assert main(["tune", "--resume", str(tmp_path / "toy")]) == 2
    assert f"its newest is {tmp_path / 'toy' / 'tune-1'}" in capsys.readouterr().err


def test_a_second_process_on_a_search_is_refused(tmp_path: Path) -> None:
    config = search_config(tmp_path, {"num_samples": 7, "scheduler": "none"}, data={"delay": 0.3})
    search = Search(tmp_path, "--config", str(config))
    search.wait_for(" finished: ")
    other = Search(tmp_path, "--resume", str(directory(tmp_path)))
    other.wait(2)
    assert f"process {search.process.pid} on" in other.log and "is still working on" in other.log
    search.wait()
    assert len(results(directory(tmp_path))) == 7


def test_earlier_trials_are_known_points_and_mlflow_has_all(tmp_path: Path) -> None:
    tracked = {"tracking": {"enabled": True, "system_metrics": False}}
    config = search_config(tmp_path, {"num_samples": 4, "scheduler": "none"}, **tracked)
    Search(tmp_path, "--config", str(config)).wait()
    first = directory(tmp_path)
    second = Search(tmp_path, "--config", str(config), "--warm-start", str(first), "tune.num_samples=2", "seed=5")
    second.wait()
    assert "4 of 4" in second.log
    (newest,) = set((tmp_path / "runs" / "toy").glob("tune-*")) - {first}
    events = [json.loads(line) for line in (newest / "journal.jsonl").open()]
    assert [event["number"] for event in events if event["event"] == "known"] == [-1, -2, -3, -4]
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("toy").experiment_id], max_results=100)
    parents = {
        run.data.tags["mlflow.runName"]: run.info.run_id for run in runs if "mlflow.parentRunId" not in run.data.tags
    }
    assert set(parents) == {first.name, newest.name}
    nested = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[first.name]]
    assert len(nested) == 4 and {run.info.status for run in runs} == {"FINISHED"}
    assert all("optimizer.lr" in run.data.params and "val/loss" in run.data.metrics for run in nested)


def test_data_that_can_not_be_loaded_end_the_search_with_their_line(tmp_path: Path) -> None:
    config = search_config(
        tmp_path,
        {"space": {"optimizer.lr": {"log_uniform": [1e-4, 1.0]}}},
        data={"name": "image_folder", "path": str(tmp_path / "none"), "samples": None, "batch_size": 10},
    )
    content = json.loads(config.read_text())
    del content["data"]["samples"]
    config.write_text(json.dumps(content))
    search = Search(tmp_path, "--config", str(config))
    search.wait(2)
    search.is_gone()
    (error,) = [line for line in search.log.splitlines() if line.startswith("trainer: error")]
    assert "data.path: there is no folder" in error and "Traceback" not in search.log

"""Which run is gone on with, from which checkpoint, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import toy_config
from outcome import assert_same_bits, entries, losses, only_run, record
from stopping import stopping
from toy import points

from trainer import checkpoint, environment, run_lock
from trainer.cli import main
from trainer.files import write_atomically
from trainer.run import find_runs

SECTIONS: dict[str, Any] = {
    "model": {"name": "toy.net", "dropout": 0.2},
    "train": {"max_epochs": 2, "ema_decay": 0.9},
    "checkpoint": {"every_steps": 4, "keep": 5},
}


def fit(folder: Path, name: str, *extra: str, **sections: Any) -> int:
    return main(["fit", "--config", str(toy_config(folder, name=name, **{**SECTIONS, **sections})), *extra])


def resume(run: Path, *overrides: str) -> int:
    return main(["fit", "--resume", str(run), *overrides])


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith(("trainer: ", "Traceback"))]


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the record of attempts, locks and signs of life."""
    passing = ("run.json", ".failure", ".lock", ".run.lock")
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in passing)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.parent.name != "health"}


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`stop_after(n)`: SIGTERM to this process while it loads the nth training batch from now."""
    return lambda calls: stopping(monkeypatch, calls)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run of 20 steps."""
    folder = tmp_path_factory.mktemp("finished")
    assert fit(folder, "toy") == 0
    return only_run(folder)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, stopped after 14 steps, with checkpoints of steps 4, 8, 12 and 14."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        stopping(patch, 14)
        assert fit(folder, "toy") == 75
    run = only_run(folder)
    # The record of a killed run: nobody wrote its end.
    killed = {**record(run), "status": "running", "pid": 2**22 + 1}
    write_atomically(run / "run.json", json.dumps(killed).encode())
    return run


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    """A copy of `stopped` for one test."""
    return Path(shutil.copytree(stopped, tmp_path / "runs" / "toy" / stopped.name))


def test_auto_starts_a_run_goes_on_with_it_until_it_is_finished_and_then_starts_another(
    tmp_path: Path, stop_after: Callable[[int], None], finished: Path
) -> None:
    stop_after(3)
    assert fit(tmp_path, "toy", "resume=auto") == 75
    first = only_run(tmp_path)
    assert record(first)["status"] == "preempted" and record(first)["exit_reason"] == "SIGTERM"
    assert entries(first)[-1]["step"] == 3
    stop_after(9)
    assert fit(tmp_path, "toy", "resume=auto") == 75
    assert only_run(tmp_path) == first and entries(first)[-1]["step"] == 12
    assert fit(tmp_path, "toy", "resume=auto") == 0
    assert_same_bits(only_run(tmp_path), finished)
    assert [attempt["status"] for attempt in record(first)["attempts"]] == ["preempted", "preempted", "finished"]
    assert fit(tmp_path, "toy", "resume=auto", "train.max_steps=1") == 0
    assert len(find_runs(tmp_path / "runs")) == 2


def test_auto_takes_up_failed_killed_and_lost_runs_of_this_config_only(run: Path, tmp_path: Path) -> None:
    def auto(*overrides: str) -> list[str]:
        assert fit(tmp_path, "toy", "resume=auto", "train.max_steps=15", *overrides) == 0
        return [found.id for found in find_runs(tmp_path / "runs")]

    original = record(run)
    for change in (
        {"status": "failed"},
        {"status": "running", "pid": 2**22 + 1},
        {"status": "running", "host": "a-node-that-went-down"},
    ):
        (run / "run.json").write_text(json.dumps({**original, **change}))
        still = time.time() - run_lock.ALIVE_SECONDS - 1
        for sign in (run / "health").glob("*"):
            os.utime(sign, (still, still))
        assert auto() == [run.name], change
    (run / "run.json").write_text(json.dumps(original))
    assert len(auto("seed=1")) == 2
    assert len(auto("optimizer.lr=0.5")) == 3
    (run / "config.yaml").write_text("name: toy\nold_key: 1\n")
    assert len(auto()) == 4


@pytest.mark.parametrize("how", ["--resume", "auto"])
def test_a_run_that_is_still_at_work_is_left_alone(
    how: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "run.json").write_text(json.dumps({**record(run), "pid": os.getpid(), "process_started": None}))
    before = content(run)
    assert (resume(run) if how == "--resume" else fit(tmp_path, "toy", "resume=auto")) == 2
    (line,) = errors(capsys)
    assert line.startswith(f"trainer: error: {run}: process {os.getpid()} on {environment.host()} is still working on")
    assert content(run) == before
    assert fit(tmp_path, "toy", "train.max_steps=1") == 0, "another beside it, for one who wants that"
    assert len([path for path in run.parent.iterdir() if path.is_dir()]) == 2


def test_a_run_whose_process_is_a_zombie_is_taken_up(run: Path, tmp_path: Path, finished: Path) -> None:
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
        zombie = {"pid": process.pid, "process_started": environment.process_started(process.pid)}
        (run / "run.json").write_text(json.dumps({**record(run), **zombie}))
        assert fit(tmp_path, "toy", "resume=auto") == 0
    assert_same_bits(only_run(tmp_path), finished)


def test_resume_takes_a_folder_an_id_and_the_config_in_the_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resume(run, "train.max_steps=15") == 0
    assert main(["fit", "--resume", run.name[:-2], "train.max_steps=16"]) == 0
    assert resume(run / "config.yaml", "train.max_steps=null") == 0
    assert losses(run) == losses(finished)


def test_a_finished_run_is_not_trained_again_but_can_be_extended(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str], stop_after: Callable[[int], None]
) -> None:
    assert fit(tmp_path, "toy", "train.max_epochs=1") == 0
    run = only_run(tmp_path)
    before = content(run)
    assert resume(run) == 2
    assert errors(capsys) == [
        f"trainer: error: {run} is finished; to train longer, raise train.max_epochs, e.g. train.max_epochs=20"
    ]
    assert content(run) == before
    stop_after(5)
    assert resume(run, "train.max_epochs=2") == 75
    assert resume(run) == 0  # as the message of the preempted attempt says: it goes on to the end that was asked for
    assert_same_bits(run, finished)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=1", "seed"),
        ("model.width=16", "model.width"),
        ("data.samples=101", "data.samples"),
        ("optimizer.lr=0.5", "optimizer.lr"),
        ("schedule=cosine", "schedule."),
        ("recipe.weighted=true", "recipe.weighted"),
    ],
)
def test_a_run_of_another_config_is_refused_and_nothing_is_lost(
    override: str, key: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(run)
    assert resume(run, override) == 2
    (line,) = errors(capsys)
    assert line.startswith(f"trainer: error: {run} belongs to another config: {key}") and "without --resume" in line
    assert content(run) == before and record(run)["status"] == "running"


def test_what_says_how_and_not_what_may_change(run: Path) -> None:
    overrides = ["train.log_every=3", "train.clip_norm=1.0", "data.batch_size=5", "data.workers=1", "checkpoint.keep=1"]
    assert resume(run, *overrides, "train.max_epochs=3", "evaluate.every_epochs=null") == 0
    assert entries(run)[-1]["epoch"] == 3.0


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped bit in the weights": (lambda p: flip(p / "model.safetensors"), "model.safetensors: its sha256 differs"),
    "flipped bit in the numbers": (lambda p: flip(p / "state.json"), "state.json: its sha256 differs"),
    "truncated": (lambda p: truncate(p / "optimizer.safetensors"), "optimizer.safetensors: "),
    "a file is gone": (lambda p: (p / "random.safetensors").unlink(), "random.safetensors: No such file or directory"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json: "),
    "empty manifest": (lambda p: (p / "manifest.json").write_text(""), "manifest.json: "),
    "a manifest that is none": (lambda p: (p / "manifest.json").write_text("[1]"), "manifest.json: "),
    "a manifest of no version": (lambda p: (p / "manifest.json").write_text("{}"), "manifest.json: "),
    "a manifest of an odd version": (
        lambda p: (p / "manifest.json").write_text('{"format_version": "new"}'),
        "manifest.json: ",
    ),
    "a manifest without files": (
        lambda p: (p / "manifest.json").write_text(
            json.dumps({**json.loads((p / "manifest.json").read_text()), "files": {}})
        ),
        "manifest.json: ",
    ),
    "an empty folder": (lambda p: [file.unlink() for file in p.iterdir()], "manifest.json: "),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    damage: str, run: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harm, reason = DAMAGE[damage]
    harm(run / "checkpoints" / "step-00000014")
    assert resume(run) == 0
    told = capsys.readouterr().err
    assert f"step-00000014 is damaged ({reason}" in told and "using the one before it" in told
    assert "going on from step-00000012" in told
    assert_same_bits(run, finished)
    assert (run / "checkpoints" / "damaged-step-00000014").is_dir()


def test_several_damaged_checkpoints_are_passed_over(
    run: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (14, 12, 8):
        flip(run / "checkpoints" / f"step-{step:08d}" / "ema.safetensors")
    assert resume(run) == 0
    assert "going on from step-00000004" in capsys.readouterr().err
    assert_same_bits(run, finished)


def test_damaged_checkpoints_do_not_push_out_whole_ones(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (14, 12):
        flip(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
    assert resume(run, "checkpoint.keep=1", "train.max_steps=9") == 0
    assert resume(run, "train.max_steps=10") == 0
    told = capsys.readouterr().err
    assert "going on from step-00000008" in told and "going on from step-00000009" in told


@pytest.mark.parametrize("how", ["--resume", "auto"])
def test_where_no_checkpoint_is_whole_nothing_is_touched(
    how: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (4, 8, 12, 14):
        flip(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
    before = content(run)
    assert (resume(run) if how == "--resume" else fit(tmp_path, "toy", "resume=auto")) == 2
    (line,) = errors(capsys)
    assert line.startswith(f"trainer: error: {run}/checkpoints: none of 4 checkpoints is whole")
    assert {**content(run), "config.yaml": b""} == {**before, "config.yaml": b""}


def test_what_a_killed_save_left_behind_is_removed(run: Path, finished: Path) -> None:
    half = run / "checkpoints" / ".unfinished-step-00000016"
    shutil.copytree(run / "checkpoints" / "step-00000014", half)
    (half / "manifest.json").unlink()
    assert resume(run) == 0
    assert not list((run / "checkpoints").glob(".*"))
    assert_same_bits(run, finished)


def test_a_newer_format_is_refused_and_nothing_is_touched(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = run / "checkpoints" / "step-00000014" / "manifest.json"
    raw = {**json.loads(manifest.read_text()), "format_version": 3, "new_field": True}
    manifest.write_bytes(checkpoint.sealed(raw))
    before, its_record = content(run), record(run)
    assert resume(run) == 2
    (line,) = errors(capsys)
    assert "step-00000014 has checkpoint format 3, this version reads up to 2: upgrade yaml-trainer" in line
    assert content(run) == before and record(run) == its_record


def test_a_run_killed_between_its_last_step_and_its_end_is_only_finished(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / finished.name))
    (run / "run.json").write_text(json.dumps({**record(run), "status": "running", "pid": 2**22 + 1}))
    assert resume(run) == 0
    assert record(run)["status"] == "finished"
    assert_same_bits(run, finished)


def test_a_line_torn_by_a_crash_is_no_obstacle(run: Path, finished: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "epoch": 1.5, "tr')
    assert resume(run) == 0
    assert_same_bits(run, finished)


def test_bad_samples_of_earlier_attempts_count_and_are_listed_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"samples": 20, "batch_size": 1, "bad": [2, 5, 11], "max_bad_samples": 3}
    assert fit(tmp_path, "toy", "train.max_steps=20", data=data) == 0
    run = only_run(tmp_path)
    with (run / "bad_samples.jsonl").open("a") as file:
        file.write('{"split": "tra')
    assert resume(run, "train.max_steps=40") == 0
    assert len([json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]) == 3
    capsys.readouterr()
    assert resume(run, "train.max_steps=60", "train.max_epochs=3", "data.max_bad_samples=2") == 2
    assert "3 samples can't be read and data.max_bad_samples is 2" in errors(capsys)[0]


def test_a_damaged_best_gives_way_to_the_next_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {"name": "toy.given_metrics", "values": [0.5, 0.9, 0.8, 0.1]}
    monitor = {"monitor": "val/given", "keep": 9, "every_epochs": 1}
    train = {"max_epochs": 4}
    assert fit(tmp_path, "toy", "evaluate.test=false", recipe=recipe, checkpoint=monitor, train=train) == 0
    run = only_run(tmp_path)
    flip(run / "checkpoints" / "step-00000020" / "model.safetensors")
    capsys.readouterr()
    assert resume(run, "evaluate.test=true") == 0
    told = capsys.readouterr().err
    assert "step-00000020 is damaged (model.safetensors: its sha256 differs); it is kept as damaged-step-000" in told
    assert not (run / "checkpoints" / "step-00000020").exists()


def test_data_that_have_changed_are_told(
    run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(points.Points, "fingerprint", "other points")
    assert resume(run) == 0
    assert "warning: the data are not those that this run began with" in capsys.readouterr().err
    monkeypatch.undo()
    assert resume(run, "train.max_steps=21", "train.max_epochs=3") == 0
    assert "warning" not in capsys.readouterr().err


def test_nothing_to_train_says_what_to_pass(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["fit"]) == 2
    assert "--config" in errors(capsys)[0] and "--resume" in capsys.readouterr().err + "--resume"
    assert main(["fit", "--resume", str(tmp_path / "nowhere")]) == 2
    assert "no such run directory" in errors(capsys)[0]

"""When the loop logs, evaluates, saves and stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import toy_config
from outcome import entries, losses, only_run, record, state
from stopping import stopping

from trainer.cli import main


def fit(folder: Path, *overrides: str, **sections: Any) -> int:
    return main(["fit", "--config", str(toy_config(folder, **sections)), *overrides])


def steps(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in sorted((run / "checkpoints").iterdir())]


@pytest.mark.parametrize(("mode", "values", "best"), [("max", (0.5, 0.7, 0.6), 3), ("min", (0.5, 0.3, 0.4), 3)])
def test_a_metric_that_is_no_number_is_never_the_best(
    mode: str, values: tuple[float, ...], best: int, tmp_path: Path
) -> None:
    given = [-1, values[0], values[1], -1, values[2], -1]
    recipe = {"name": "toy.given_metrics", "values": given}
    monitor = {"monitor": "val/given", "mode": mode, "keep": 1}
    assert fit(tmp_path, "train.max_epochs=6", "evaluate.test=false", recipe=recipe, checkpoint=monitor) == 0
    run = only_run(tmp_path)
    assert steps(run) == [10 * best, 60]
    assert state(run)[1]["progress"]["best"] == values[1]


def test_saves_and_evaluates_by_steps_epochs_and_minutes(tmp_path: Path) -> None:
    assert fit(tmp_path, "name=steps", "checkpoint.every_steps=6", "checkpoint.keep=9", "evaluate.every_steps=8") == 0
    assert steps(only_run(tmp_path, "steps")) == [6, 12, 18, 20]
    evaluated = [e["step"] for e in entries(only_run(tmp_path, "steps")) if "val/loss" in e]
    assert evaluated == [8, 10, 16, 20]
    often = ["train.max_epochs=5", "checkpoint.every_epochs=2", "checkpoint.keep=9", "evaluate.every_epochs=3"]
    assert fit(tmp_path, "name=epochs", *often) == 0
    assert steps(only_run(tmp_path, "epochs")) == [20, 40, 50]
    assert [e["step"] for e in entries(only_run(tmp_path, "epochs")) if "val/loss" in e] == [30, 50]
    assert fit(tmp_path, "name=minutes", "checkpoint.every_minutes=0.000001", "checkpoint.keep=99") == 0
    assert steps(only_run(tmp_path, "minutes")) == list(range(1, 21))


def test_a_wish_to_stop_at_the_last_step_finds_the_run_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping(monkeypatch, 20)
    assert fit(tmp_path) == 0
    assert record(only_run(tmp_path))["status"] == "finished" and len(losses(only_run(tmp_path))) == 20


def test_the_shorter_of_epochs_and_steps_ends_the_training(tmp_path: Path) -> None:
    assert fit(tmp_path, "name=steps", "train.max_steps=13") == 0
    assert fit(tmp_path, "name=epochs", "train.max_steps=1000") == 0
    assert [len(losses(only_run(tmp_path, name))) for name in ("steps", "epochs")] == [13, 20]


def test_the_schedule_counts_optimizer_steps_and_nothing_else(tmp_path: Path) -> None:
    schedule = {"name": "linear", "warmup_steps": 4}
    for name, change in (("whole", "data.batch_size=20"), ("parts", "train.accumulate=2")):
        assert fit(tmp_path, f"name={name}", change, schedule=schedule) == 0
    whole, parts = ([e["lr"] for e in entries(only_run(tmp_path, name)) if "lr" in e] for name in ("whole", "parts"))
    assert whole == parts == pytest.approx([0.00025, 0.0005, 0.00075, 0.001, 0.001, 0.0008, 0.0006, 0.0004, 0.0002, 0])


def test_the_norm_is_logged_as_it_is_before_gradients_are_clipped(tmp_path: Path) -> None:
    sgd = {"name": "sgd", "lr": 1.0, "momentum": 0.0}
    assert fit(tmp_path, "name=free", optimizer=sgd) == 0
    assert fit(tmp_path, "name=clipped", "train.clip_norm=1e-6", optimizer=sgd) == 0
    free = [e["grad_norm"] for e in entries(only_run(tmp_path, "free")) if "train/loss" in e]
    clipped = [e for e in entries(only_run(tmp_path, "clipped")) if "train/loss" in e]
    assert all(entry["grad_norm"] > 0.1 for entry in clipped) and clipped[0]["grad_norm"] == free[0]
    values = [entry["train/loss"] for entry in clipped]
    assert len(values) == 20 and values[0] == losses(only_run(tmp_path, "free"))[0]
    before, after = (state_sum(tmp_path, name) for name in ("clipped", "free"))
    assert before != after


def state_sum(folder: Path, name: str) -> float:
    tensors, _ = state(only_run(folder, name))
    return sum(float(t.double().sum()) for key, t in tensors.items() if key.startswith("model/"))

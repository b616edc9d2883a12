"""A loss or gradient that is no number: stop with the samples, skip the step, or go back and leave it out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import toy_config
from outcome import assert_same_bits, entries, only_run, record, state
from processes import ForkServer, wait_until

from trainer.cli import main

BAD = 57
"""The training sample that holds no numbers; by the seed it is in the middle of each epoch."""
SECTIONS: dict[str, Any] = {
    "data": {"samples": 100, "batch_size": 10, "nan": [BAD]},
    "train": {"max_epochs": 2, "ema_decay": 0.9},
    "model": {"name": "toy.net", "dropout": 0.2},
    "optimizer": {"name": "adamw", "lr": 0.003},
    "checkpoint": {"every_steps": 2},
}


def fit(folder: Path, name: str, *overrides: str) -> int:
    return main(["fit", "--config", str(toy_config(folder, name=name, **SECTIONS)), *overrides])


def noted(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "non_finite.jsonl").read_text().splitlines()]


def steps(run: Path) -> list[int]:
    return [entry["step"] for entry in entries(run) if "train/loss" in entry]


@pytest.mark.parametrize("processes", [1, 2])
def test_by_default_the_run_stops_and_names_step_and_samples(
    processes: int, tmp_path: Path, server: ForkServer
) -> None:
    config = toy_config(tmp_path, **SECTIONS)
    batch = f"data.batch_size={10 // processes}"
    training = server.run("fit", "--config", str(config), batch, cwd=tmp_path, processes=processes)
    assert training.wait() == [1] * processes
    run = only_run(tmp_path)
    (entry,) = noted(run)
    lines = [text for text in training.log().splitlines() if text.startswith("trainer: ")]
    assert len(lines) == 1 and f"loss nan at step {entry['step']} (samples " in lines[0] and str(BAD) in lines[0]
    # Of two ranks only the micro-batch of the one that met it is named.
    (part,) = entry["samples"]
    assert BAD in part["indices"] and len(part["indices"]) == 10 // processes and part["loss"] == "nan"
    assert record(run)["status"] == "failed" and "loss nan" in record(run)["exit_reason"]
    tensors, numbers = state(run)
    assert numbers["progress"]["step"] < entry["step"]
    assert all(torch.isfinite(t).all() for name, t in tensors.items() if not name.startswith("random/"))


def test_a_skipped_step_changes_nothing_but_counts(tmp_path: Path) -> None:
    assert fit(tmp_path, "skips", "train.non_finite=skip", "checkpoint.every_steps=1", "checkpoint.keep=30") == 0
    run = only_run(tmp_path, "skips")
    assert steps(run) == list(range(1, 21)) and [entry["policy"] for entry in noted(run)] == ["skip", "skip"]
    skipped = [entry["step"] for entry in noted(run)]
    assert [e["step"] for e in entries(run) if isinstance(e.get("train/loss"), str)] == skipped
    from trainer import checkpoint, saving

    for step in skipped:
        before, after = (
            saving.load(found.path, found.manifest)
            for found in (
                checkpoint.read(run / "checkpoints" / checkpoint.folder_name(number)) for number in (step - 1, step)
            )
        )
        for group in ("model", "optimizer", "ema"):
            one, other = getattr(before, group), getattr(after, group)
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert math.isfinite(entries(run)[-1]["test/loss"])


def test_skipping_without_end_is_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = f"data.nan=[{', '.join(map(str, range(100)))}]"
    assert fit(tmp_path, "hopeless", "train.non_finite=skip", everything) == 1
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("trainer: ")]
    assert "after 10 skipped steps in a row" in line


@pytest.mark.parametrize("processes", [1, 2])
def test_a_rollback_leaves_the_step_out_and_a_killed_run_ends_alike(
    processes: int, tmp_path: Path, server: ForkServer
) -> None:
    batch = f"data.batch_size={10 // processes}"
    args = ["train.non_finite=rollback", batch, "data.workers=1"]
    steady = toy_config(tmp_path, name="steady", **SECTIONS)
    reference = server.start("fit", "--config", str(steady), *args, cwd=tmp_path, processes=processes)
    killed = toy_config(tmp_path, name="killed", **SECTIONS)
    command = ["fit", "--config", str(killed), *args, "resume=auto", "data.delay=0.03"]
    first = server.start(*command, cwd=tmp_path, processes=processes)
    wait_until(lambda: list((tmp_path / "runs" / "killed").glob("*/non_finite.jsonl")), "the rollback")
    first.kill()
    last = server.run(*command, cwd=tmp_path, processes=processes)
    assert last.wait() == reference.wait() == [0] * processes, last.log()

    run, other = only_run(tmp_path, "steady"), only_run(tmp_path, "killed")
    assert "and those samples are left out" in reference.log()
    assert steps(run) == list(range(1, 19))  # 20 steps, and one of each epoch is left out
    assert all(math.isfinite(entry["train/loss"]) for entry in entries(run) if "train/loss" in entry)
    assert state(run)[1]["progress"]["consumed"] == 200
    assert_same_bits(other, run)


def test_a_rollback_without_an_earlier_checkpoint_goes_back_to_the_beginning(tmp_path: Path) -> None:
    assert fit(tmp_path, "early", "train.non_finite=rollback", "checkpoint.every_steps=null") == 0
    assert [entry["from"] for entry in noted(only_run(tmp_path, "early"))] == [0, 0]
    assert steps(only_run(tmp_path, "early")) == list(range(1, 19))


def test_too_many_rollbacks_to_one_checkpoint_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = f"data.nan=[{', '.join(map(str, range(100)))}]"
    assert fit(tmp_path, "hopeless", "train.non_finite=rollback", everything) == 1
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("trainer: ")]
    assert "after 5 returns to the checkpoint of step 0" in line

"""What goes wrong on one rank, or on all, ends all of them soon, with one line that says what it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness import toy_config
from outcome import entries, only_run, record, state
from processes import ForkServer, Training, wait_until

SOON = 40.0


def start(server: ForkServer, folder: Path, *extra: str, processes: int = 2, **sections: Any) -> Training:
    config = toy_config(folder, **sections)
    return server.start("fit", "--config", str(config), *extra, cwd=folder, processes=processes)


def told(training: Training, rank: int = 0) -> list[str]:
    return [line for line in training.log(rank).splitlines() if line.startswith("trainer: ")]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_on_one_rank_ends_all_and_its_cause_is_written_down(
    rank: int, strategy: str, tmp_path: Path, server: ForkServer
) -> None:
    failing = {"name": "toy.failing_recipe", "rank": rank}
    training = start(server, tmp_path, "checkpoint.every_steps=1", recipe=failing, strategy=strategy)
    assert training.wait(SOON) == [1, 1]
    assert "trainer: failed: ValueError: the sky is falling (--debug shows the traceback)" in told(training, rank)[0]
    now = record(only_run(tmp_path))
    assert now["status"] == "failed" and "the sky\nis falling" in now["exit_reason"], now["exit_reason"]
    # What was being written when it failed is finished.
    assert state(only_run(tmp_path))[1]["progress"]["step"] == 3


def test_an_exception_in_a_data_worker_of_one_rank_ends_all(tmp_path: Path, server: ForkServer) -> None:
    config = toy_config(tmp_path, data={"name": "toy.failing_points", "workers": 1})
    text = json.loads(config.read_text())
    del text["data"]["samples"]
    config.write_text(json.dumps(text))
    training = server.start("fit", "--config", str(config), cwd=tmp_path, processes=2)
    assert training.wait(SOON) == [1, 1]
    assert any("ValueError: no such colour" in line for rank in (0, 1) for line in told(training, rank))
    assert not training.leftovers()


def test_too_many_bad_samples_end_all_ranks_alike(tmp_path: Path, server: ForkServer) -> None:
    bad = {"bad": [3, 17, 40], "max_bad_samples": 2}
    training = start(server, tmp_path, data=bad)
    assert training.wait(SOON) == [2, 2]
    (line,) = told(training)
    assert "3 samples can't be read and data.max_bad_samples is 2" in line
    assert len((only_run(tmp_path) / "bad_samples.jsonl").read_text().splitlines()) == 3
    assert record(only_run(tmp_path))["status"] == "failed"


def test_bad_samples_within_the_limit_do_not_stop_ranks(tmp_path: Path, server: ForkServer) -> None:
    bad = {"samples": 8, "batch_size": 1, "bad": [0, 1, 2, 3, 4, 5, 6], "max_bad_samples": 7}
    training = start(server, tmp_path, data=bad)
    assert training.wait(SOON) == [0, 0], training.log()
    values = [entry["train/loss"] for entry in entries(only_run(tmp_path)) if "train/loss" in entry]
    assert len(values) == 8 and sum(value > 0 for value in values) == 2


def test_single_under_several_processes_and_a_batch_too_large_are_one_line_each(
    tmp_path: Path, server: ForkServer
) -> None:
    training = start(server, tmp_path, strategy={"name": "single"})
    assert training.wait(SOON) == [2, 2]
    assert told(training) == [
        "trainer: error: strategy: single runs one process, but 2 were started; use auto, ddp or fsdp"
    ]
    training = start(server, tmp_path, "data.batch_size=51")
    assert training.wait(SOON) == [2, 2]
    (line,) = told(training)
    assert "a global batch of 102 (51 × 2 processes × 1 accumulated) is more than the 100 training samples" in line
    assert not (tmp_path / "runs").exists()


def test_what_only_rank_0_finds_out_ends_the_others_too(tmp_path: Path, server: ForkServer) -> None:
    training = start(server, tmp_path, "train.max_steps=2")
    assert training.wait(SOON) == [0, 0], training.log()
    (manifest,) = (only_run(tmp_path) / "checkpoints").glob("*/manifest.json")
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format_version": 99}))
    training = server.start("fit", "--resume", str(only_run(tmp_path)), "train.max_steps=4", cwd=tmp_path, processes=2)
    assert training.wait(SOON) == [2, 2]
    (line,) = told(training)
    assert "has checkpoint format 99, this version reads up to 1: upgrade yaml-trainer" in line

    busy = start(server, tmp_path, "name=busy", "data.delay=0.02", "train.max_epochs=1000")
    wait_until(lambda: list((tmp_path / "runs").glob("busy/*/metrics.jsonl")), "the start")
    second = server.run("fit", "--resume", str(only_run(tmp_path, "busy")), cwd=tmp_path, processes=2)
    assert second.wait() == [2, 2]
    (line,) = told(second)
    assert "is still working on this run" in line
    busy.kill()

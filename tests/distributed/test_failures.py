"""What goes wrong on one rank, or on all, ends all of them soon, with one line that says what it was."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from harness import toy_config
from outcome import entries, only_run, record, state
from processes import ForkServer, Training, wait_until

from trainer import checkpoint

SOON = 40.0


def start(server: ForkServer, folder: Path, *extra: str, processes: int = 2, **sections: Any) -> Training:
    config = toy_config(folder, **sections)
    return server.start("fit", "--config", str(config), *extra, cwd=folder, processes=processes)


def told(training: Training, rank: int = 0) -> list[str]:
    return [line for line in training.log(rank).splitlines() if line.startswith("trainer: ")]


def cause_told_once(training: Training, ranks: int = 2) -> str:
    """The one line that tells the cause; other ranks say at most that they end because of it."""
    lines = [line for rank in range(ranks) for line in told(training, rank)]
    causes = [line for line in lines if not re.match("trainer: error: ended by the failure of rank", line)]
    assert len(causes) == 1, lines
    return causes[0]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_on_one_rank_ends_all_and_its_cause_is_told_once(
    rank: int, strategy: str, tmp_path: Path, server: ForkServer
) -> None:
    failing = {"name": "toy.failing_recipe", "rank": rank}
    training = start(server, tmp_path, "checkpoint.every_steps=1", recipe=failing, strategy=strategy)
    assert training.wait(SOON) == [1, 1]
    where = "" if rank == 0 else " on rank 1"
    line = f"trainer: failed{where}: ValueError: the sky is falling (--debug shows the traceback)"
    assert cause_told_once(training) == line and told(training, rank) == [line]
    now = record(only_run(tmp_path))
    assert now["status"] == "failed" and now["exit_reason"] == f"rank {rank}: ValueError: the sky\nis falling"
    # What was being written when it failed is finished.
    assert state(only_run(tmp_path))[1]["progress"]["step"] == 3


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["exit", "kill"])
def test_a_rank_that_is_gone_without_a_word_ends_the_other_which_names_it(
    how: str, rank: int, strategy: str, tmp_path: Path, server: ForkServer
) -> None:
    failing = {"name": "toy.failing_recipe", "rank": rank, "how": how}
    training = start(server, tmp_path, recipe=failing, strategy=strategy)
    codes = training.wait(SOON)
    assert codes[rank] == {"exit": 3, "kill": -signal.SIGKILL}[how] and codes[1 - rank] == 1
    line = cause_told_once(training)
    assert re.search(
        rf"rank {rank} \(process {training.pids[rank]} on .*\), step 4, phase forward: the process ended", line
    )
    now = record(only_run(tmp_path))
    assert now["status"] == "failed" and now["exit_reason"] in line
    assert not training.leftovers()


@pytest.mark.parametrize(("how", "rank", "strategy"), [("loop", 0, "fsdp"), ("loop", 1, "ddp"), ("hold", 1, "ddp")])
def test_a_rank_that_does_not_come_on_is_named_with_the_collective_the_other_waits_in(
    how: str, rank: int, strategy: str, tmp_path: Path, server: ForkServer
) -> None:
    failing = {"name": "toy.failing_recipe", "rank": rank, "how": how}
    training = start(server, tmp_path, "train.step_timeout=3", recipe=failing, strategy=strategy)
    codes = training.wait(SOON)
    assert codes[1 - rank] == 1 and codes[rank] == (1 if how == "loop" else -signal.SIGABRT)
    line = cause_told_once(training)
    assert f"no progress for 3 s: rank {rank} (process {training.pids[rank]}" in line, line
    assert "step 4, phase forward" in line and "the others wait in gloo:" in line, line
    now = record(only_run(tmp_path))
    assert now["status"] == "failed" and now["exit_reason"] in line
    stacks = [(only_run(tmp_path) / "health" / f"rank-{r}.stacks").read_text() for r in (0, 1)]
    assert "failing_recipe.py" in stacks[rank] and "in fail" in stacks[rank]
    assert "waits_in" in stacks[1 - rank] and "loop.py" in stacks[1 - rank]
    if how == "loop":
        assert re.search(r"failing_recipe\.py:\d+ fail is behind", line), line
    assert not training.leftovers()


def test_a_hang_of_a_single_process_ends_it(tmp_path: Path, server: ForkServer) -> None:
    training = start(server, tmp_path, "train.step_timeout=2", "data.delay=1000", processes=1)
    assert training.wait(SOON) == [1]
    (line,) = told(training)
    assert re.search(r"no progress for 2 s: rank 0 .*, step 1, phase data at .*points\.py:\d+ batch; stacks: ", line), (
        line
    )
    assert record(only_run(tmp_path))["exit_reason"] in line


def test_a_job_that_was_stopped_and_continued_is_no_hang(tmp_path: Path, server: ForkServer) -> None:
    training = start(server, tmp_path, "train.step_timeout=1", "train.max_epochs=5", "data.delay=0.05", processes=1)
    wait_until(lambda: "step 1/" in training.log(), "the first step")
    training.send(signal.SIGSTOP)
    began = time.monotonic()
    wait_until(lambda: time.monotonic() - began > 9, "much more than the limit", pause=0.1)
    training.send(signal.SIGCONT)
    assert training.wait() == [0], training.log()


def test_a_persistent_straggler_is_named_while_the_job_runs(tmp_path: Path, server: ForkServer) -> None:
    slow = {"name": "toy.failing_recipe", "rank": 1, "how": "slow", "at": 10}
    training = start(server, tmp_path, "train.max_epochs=24", "train.log_every=5", recipe=slow)
    assert training.wait() == [0, 0], training.log()
    text = training.log()
    assert text.count("rank 1 is slow, and the others wait for it") == 1
    assert text.count("rank 1 keeps up with the others again") == 1
    logged = [e for e in (only_run(tmp_path) / "metrics.jsonl").read_text().splitlines() if "slowest_rank_ratio" in e]
    assert any(json.loads(e)["slowest_rank"] == 1 and json.loads(e)["slowest_rank_ratio"] > 2 for e in logged)


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
    manifest.write_bytes(checkpoint.sealed({**json.loads(manifest.read_text()), "format_version": 99}))
    training = server.start("fit", "--resume", str(only_run(tmp_path)), "train.max_steps=4", cwd=tmp_path, processes=2)
    assert training.wait(SOON) == [2, 2]
    (line,) = told(training)
    assert "has checkpoint format 99, this version reads up to 2: upgrade yaml-trainer" in line

    busy = start(server, tmp_path, "name=busy", "data.delay=0.02", "train.max_epochs=1000")
    wait_until(lambda: list((tmp_path / "runs").glob("busy/*/metrics.jsonl")), "the start")
    second = server.run("fit", "--resume", str(only_run(tmp_path, "busy")), cwd=tmp_path, processes=2)
    assert second.wait() == [2, 2]
    (line,) = told(second)
    assert "is still working on this run" in line
    busy.kill()

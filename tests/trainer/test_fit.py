"""One training from its config to its end, in this process."""

from __future__ import annotations

import json
import multiprocessing
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import toy_config
from outcome import assert_same_bits, entries, losses, only_run, record, state

from trainer.cli import main

RANDOM: dict[str, Any] = {
    "model": {"name": "toy.net", "dropout": 0.3},
    "train": {"ema_decay": 0.9, "clip_norm": 0.5},
    "schedule": {"name": "linear", "warmup_steps": 3},
}


def fit(folder: Path, name: str = "toy", *extra: str, **sections: Any) -> int:
    return main(["fit", "--config", str(toy_config(folder, name=name, **sections)), *extra])


def error_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith(("trainer: ", "Traceback"))]


def test_two_runs_of_one_seed_are_bit_identical_and_workers_do_not_matter(tmp_path: Path) -> None:
    for name, workers in (("one", 0), ("two", 0), ("three", 2)):
        assert fit(tmp_path, name, data={"workers": workers}, **RANDOM) == 0
    assert_same_bits(only_run(tmp_path, "one"), only_run(tmp_path, "two"))
    assert_same_bits(only_run(tmp_path, "one"), only_run(tmp_path, "three"))
    assert fit(tmp_path, "other", "seed=1", **RANDOM) == 0
    assert losses(only_run(tmp_path, "one")) != losses(only_run(tmp_path, "other"))


def test_what_is_saved_evaluated_and_logged_changes_no_number(tmp_path: Path) -> None:
    assert fit(tmp_path, "quiet", "evaluate.every_epochs=null", "evaluate.test=false", **RANDOM) == 0
    assert (
        fit(tmp_path, "busy", "evaluate.every_steps=3", "checkpoint.every_steps=1", "train.log_every=7", **RANDOM) == 0
    )
    quiet, busy = state(only_run(tmp_path, "quiet"))[0], state(only_run(tmp_path, "busy"))[0]
    assert all(torch.equal(quiet[name], busy[name]) for name in quiet if "gauss" not in name)
    logged = {e["step"]: e["train/loss"] for e in entries(only_run(tmp_path, "busy")) if "train/loss" in e}
    assert list(logged) == [1, 7, 14, 20]
    assert [losses(only_run(tmp_path, "quiet"))[step - 1] for step in logged] == list(logged.values())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_of_the_recipe_fails_the_run_in_one_line(
    workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path, recipe={"name": "toy.failing_recipe"}, data={"workers": workers}) == 1
    assert error_lines(capsys) == ["trainer: failed: ValueError: the sky is falling (--debug shows the traceback)"]
    now = record(only_run(tmp_path))
    assert (now["status"], now["exit_reason"]) == ("failed", "ValueError: the sky\nis falling")
    assert now["attempts"][-1]["status"] == "failed" and now["attempts"][-1]["ended"]
    assert [entry["step"] for entry in entries(only_run(tmp_path))] == [1, 2, 3]
    assert not multiprocessing.active_children()


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(tmp_path, "toy", "--debug", recipe={"name": "toy.failing_recipe"}) == 1
    text = capsys.readouterr().err
    assert "Traceback" in text and "toy/failing_recipe.py" in text


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        ("ValueError", 1, "trainer: failed: ValueError: no such colour (--debug shows the traceback)"),
        ("UserError", 2, "trainer: error: no such colour"),
        ("KeyError", 1, "trainer: failed: KeyError: 'no such colour' (--debug shows the traceback)"),
    ],
)
def test_an_exception_of_the_data_reads_the_same_from_a_worker(
    workers: int, error: str, code: int, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = toy_config(tmp_path, data={"name": "toy.failing_points", "workers": workers, "error": error})
    text = json.loads(config.read_text())
    del text["data"]["samples"]
    config.write_text(json.dumps(text))
    assert main(["fit", "--config", str(config)]) == code
    assert error_lines(capsys) == [line]
    reason = f"{error}: " + ("'no such colour'" if error == "KeyError" else "no such colour")
    assert (record(only_run(tmp_path))["status"], record(only_run(tmp_path))["exit_reason"]) == ("failed", reason)
    assert not multiprocessing.active_children()


def test_a_global_batch_larger_than_the_data_set_is_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path, "toy", "data.batch_size=30", "train.accumulate=4") == 2
    (line,) = error_lines(capsys)
    assert "a global batch of 120 (30 × 1 processes × 4 accumulated) is more than the 100 training samples" in line
    assert not (tmp_path / "runs").exists()
    assert fit(tmp_path, "whole", "data.batch_size=100") == 0
    assert len(losses(only_run(tmp_path, "whole"))) == 2


def test_bad_samples_are_skipped_listed_and_limited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {"samples": 40, "batch_size": 4, "bad": [0, 3, 17]}
    assert fit(tmp_path, "skipped", data={**bad, "max_bad_samples": 3}) == 0
    listed = [
        json.loads(line) for line in (only_run(tmp_path, "skipped") / "bad_samples.jsonl").read_text().splitlines()
    ]
    assert sorted(item["index"] for item in listed) == [0, 3, 17]  # once each, in two epochs
    assert listed[0] == {
        "split": "train",
        "index": listed[0]["index"],
        "reason": f"point {listed[0]['index']} is unreadable",
    }
    capsys.readouterr()

    assert fit(tmp_path, "limited", data={**bad, "max_bad_samples": 2}) == 2
    (line,) = error_lines(capsys)
    file = only_run(tmp_path, "limited") / "bad_samples.jsonl"
    assert re.search(r"3 samples can't be read and data.max_bad_samples is 2: point \d+ is unreadable; ", line)
    assert line.endswith(f"they are listed in {file}")
    assert len(file.read_text().splitlines()) == 3
    assert record(only_run(tmp_path, "limited"))["status"] == "failed"


def test_a_batch_without_a_single_good_sample_changes_nothing_but_the_momentum(tmp_path: Path) -> None:
    bad = {"samples": 12, "batch_size": 1, "bad": list(range(11)), "max_bad_samples": 11}
    assert fit(tmp_path, "sparse", data=bad, optimizer={"name": "sgd", "momentum": 0.0}) == 0
    values = losses(only_run(tmp_path, "sparse"))
    assert len(values) == 24 and sum(value > 0 for value in values) == 2
    tensors, _ = state(only_run(tmp_path, "sparse"))
    assert all(bool(t.isfinite().all()) for name, t in tensors.items() if name.startswith("model/"))


def test_a_data_set_of_which_nothing_can_be_read_ends_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"samples": 12, "batch_size": 4, "bad": list(range(12)), "max_bad_samples": 12}
    assert fit(tmp_path, data=bad) == 2
    (line,) = error_lines(capsys)
    assert "none of the first 12 samples of the data set can be read: point" in line


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_strategy_for_several_processes_needs_them(
    strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path, "toy", f"strategy={strategy}") == 2
    (line,) = error_lines(capsys)
    assert line.startswith(f"trainer: error: strategy: {strategy} needs several processes") and "torchrun" in line
    assert not (tmp_path / "runs").exists()


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(tmp_path, optimizer={"name": "sgd", "lr": 1e30}) == 1
    (line,) = error_lines(capsys)
    pattern = (
        r"trainer: error: (loss|gradient norm) (nan|inf) at step \d+ \(samples [\d, ]+ and 2 more of epoch 0; all in "
    )
    assert re.match(pattern, line) and "lower optimizer.lr, set train.clip_norm, or set train.non_finite" in line


def test_an_unknown_monitor_is_named_with_those_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(tmp_path, "toy", "checkpoint.monitor=val/f1") != 0
    (line,) = error_lines(capsys)
    assert "no metric 'val/f1'; there are: val/accuracy, val/count, val/loss" in line


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path: Path) -> None:
    rising = {"every_steps": 1, "keep": 2, "monitor": "val/count", "mode": "max"}  # a constant: the first is the best
    assert fit(tmp_path, checkpoint=rising) == 0
    kept = sorted(path.name for path in (only_run(tmp_path) / "checkpoints").iterdir())
    assert kept == ["step-00000010", "step-00000019", "step-00000020"]


def test_the_test_split_is_evaluated_with_the_best_weights(tmp_path: Path) -> None:
    worst = {"monitor": "val/loss", "mode": "max"}  # so the best is the first, and not what training ended with
    assert fit(tmp_path, "first", train={"max_epochs": 5}, checkpoint=worst) == 0
    assert fit(tmp_path, "short", train={"max_epochs": 1}) == 0
    first, short = (entries(only_run(tmp_path, name))[-1] for name in ("first", "short"))
    assert first["test/loss"] == short["test/loss"]
    assert first["step"] == 50


def test_drop_last_leaves_out_the_ragged_end(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    data = {"samples": 47, "batch_size": 10, "drop_last": True, "trace": str(trace)}
    assert fit(tmp_path, data=data) == 0
    loads = [line.split()[:2] for line in trace.read_text().splitlines()]
    for epoch in ("0", "1"):
        indices = [index for e, index in loads if e == epoch]
        assert len(indices) == len(set(indices)) == 40
    assert [e["epoch"] for e in entries(only_run(tmp_path)) if "train/loss" in e][3] == 1.0


def test_json_tells_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(tmp_path, "toy", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["run"] == str(only_run(tmp_path)) and told["status"] == "finished" and told["steps"] == 20
    last = {k: v for e in entries(only_run(tmp_path)) for k, v in e.items() if k.startswith(("val/", "test/"))}
    assert told["metrics"] == last


def test_a_seed_beyond_what_torch_takes_is_a_mistake_of_the_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path, "toy", f"seed={2**64}") == 2
    assert "seed" in error_lines(capsys)[0]
    assert fit(tmp_path, "toy", f"seed={2**63 - 1}", "train.max_steps=2") == 0

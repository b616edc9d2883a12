"""A killed training goes on to the same bits."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from harness import toy_config
from outcome import assert_same_bits, entries, only_run, record, state
from processes import ForkServer, wait_until

RANDOM = {
    "model": {"name": "toy.net", "dropout": 0.3, "norm": "batch"},
    "data": {"samples": 203, "batch_size": 8, "workers": 2, "prefetch": 2, "delay": 0.004},
    "train": {"max_epochs": 4, "ema_decay": 0.95, "clip_norm": 1.0, "accumulate": 2},
    "schedule": {"name": "cosine", "warmup_steps": 10},
    "evaluate": {"every_epochs": 2},
    "checkpoint": {"every_steps": 4, "keep": 2, "monitor": "val/loss", "mode": "min"},
}
"""Everything that a resume can get wrong: dropout, random augmentation, workers, averages, a ragged last batch."""

WORLDS = {
    "single": (1, {}),
    "ddp": (2, {"strategy": {"name": "ddp"}}),
    "fsdp": (2, {"strategy": {"name": "fsdp"}}),
}


def logged(folder: Path, name: str, step: int) -> bool:
    files = list((folder / "runs" / name).glob("*/metrics.jsonl"))
    return bool(files) and f'"step": {step},' in files[0].read_text()


def saving(folder: Path, name: str) -> bool:
    return any((folder / "runs" / name).glob("*/checkpoints/.unfinished-*"))


ODD = {
    "ddp": {"strategy": {"name": "ddp", "find_unused_parameters": True}},
    "fsdp": {"strategy": {"name": "fsdp"}, "model": {"name": "toy.odd_net", "channels_last": False}},
}


@pytest.mark.parametrize("strategy", ODD)
def test_tied_frozen_and_unused_weights_and_batch_statistics_go_on(
    strategy: str, tmp_path: Path, server: ForkServer
) -> None:
    sections = {"model": {"name": "toy.odd_net"}, "train": {"ema_decay": 0.9, "clip_norm": 1.0}, **ODD[strategy]}
    undisturbed = toy_config(tmp_path, name="undisturbed", **sections)
    reference = server.start("fit", "--config", str(undisturbed), cwd=tmp_path, processes=2)
    config = toy_config(tmp_path, name="stopped", **sections)
    first = server.run("fit", "--config", str(config), "train.max_steps=5", cwd=tmp_path, processes=2)
    assert first.wait() == [0, 0], first.log()
    run = only_run(tmp_path, "stopped")
    second = server.run("fit", "--resume", str(run), "train.max_steps=null", cwd=tmp_path, processes=2)
    assert second.wait() == reference.wait() == [0, 0], second.log()
    tensors, numbers = state(run)
    wanted, wanted_numbers = state(only_run(tmp_path, "undisturbed"))
    assert [name for name in wanted if not torch.equal(tensors[name], wanted[name]) and "gauss" not in name] == []
    assert numbers == wanted_numbers
    assert entries(run)[-1] == entries(only_run(tmp_path, "undisturbed"))[-1]  # the metrics of the test split


@pytest.mark.parametrize("world", WORLDS)
def test_a_run_killed_again_and_again_ends_with_the_bits_of_an_undisturbed_one(
    world: str, tmp_path: Path, server: ForkServer
) -> None:
    processes, sections = WORLDS[world]
    undisturbed = toy_config(tmp_path, name="undisturbed", **RANDOM, **sections)
    reference = server.start("fit", "--config", str(undisturbed), cwd=tmp_path, processes=processes)

    config = toy_config(tmp_path, name="killed", **RANDOM, **sections)
    arguments = ["fit", "--config", str(config), "resume=auto"]
    moments = [
        ("before the first checkpoint", lambda: logged(tmp_path, "killed", 2)),
        ("in the first epoch", lambda: logged(tmp_path, "killed", 10)),
        ("while it saves", lambda: logged(tmp_path, "killed", 16) and saving(tmp_path, "killed")),
    ]
    for number, (what, moment) in enumerate(moments, 1):
        training = server.start(*arguments, cwd=tmp_path, processes=processes)
        wait_until(lambda m=moment, t=training: m() or None not in t.poll(), what)  # type: ignore[misc]
        training.kill()
        assert training.wait() == [-signal.SIGKILL] * processes, training.log()
        assert len(record(only_run(tmp_path, "killed"))["attempts"]) == number
    last = server.run("fit", "--resume", str(only_run(tmp_path, "killed")), cwd=tmp_path, processes=processes)

    assert reference.wait() == last.wait() == [0] * processes, last.log()
    assert_same_bits(only_run(tmp_path, "killed"), only_run(tmp_path, "undisturbed"))
    steps = [entry["step"] for entry in entries(only_run(tmp_path, "killed")) if "train/loss" in entry]
    assert steps == list(range(1, steps[-1] + 1))
    assert [a["status"] for a in record(only_run(tmp_path, "killed"))["attempts"]] == ["killed"] * 3 + ["finished"]

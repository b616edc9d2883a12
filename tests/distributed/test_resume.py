"""A killed training goes on to the same bits."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import soak
import torch
from harness import toy_config
from outcome import assert_same_bits, entries, only_run, record, state
from processes import ForkServer, Training, wait_until

from trainer import health

RANDOM = {
    "model": {"name": "toy.net", "dropout": 0.3, "norm": "batch"},
    "data": {"samples": 203, "batch_size": 8, "workers": 2, "prefetch": 2, "delay": 0.004, "eval_delay": 0.01},
    "train": {"max_epochs": soak.choose(6, 25), "ema_decay": 0.95, "clip_norm": 1.0, "accumulate": 2},
    "schedule": {"name": "cosine", "warmup_steps": 10},
    "evaluate": {"every_steps": 7},
    "checkpoint": {"every_steps": 4, "keep": 2, "monitor": "val/loss", "mode": "min"},
}
"""Everything that a resume can get wrong: dropout, random augmentation, workers, averages, a ragged last batch."""
KILLS = soak.choose(3, 20)

WORLDS = {
    "single": (1, {}),
    "ddp": (2, {"strategy": {"name": "ddp"}}),
    "fsdp": (2, {"strategy": {"name": "fsdp"}}),
}


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


def moment(folder: Path, training: Training, phase: str, draw: random.Random) -> str:
    """Wait until the training is in this phase, some steps further; returns what it is at, empty when it has ended."""
    runs = folder / "runs" / "killed"
    begun: list[int] = []
    further = draw.randrange(1, 5)

    def is_there() -> str:
        if None not in training.poll():
            return "ended"
        sign = next((health.read(run, 0) for run in runs.glob("2*")), None)
        # A sign of this attempt, not of the one that was killed before.
        if sign is None or sign.pid != training.pids[0] or sign.phase == "set-up":
            return ""
        begun[:] = begun or [sign.step]
        now = {"evaluate" if sign.phase in ("evaluate", "test") else "train"}
        if any(runs.glob("*/checkpoints/.unfinished-*")):  # written beside the training
            now.add("save")
        return phase if sign.step >= begun[0] + further and phase in now else ""

    found: str = wait_until(is_there, f"{phase}:\n{training.log()}", pause=0)
    if phase == "train":
        pause = time.monotonic() + draw.random() * 0.03
        wait_until(lambda: time.monotonic() > pause, "a random moment", pause=0)
    return "" if found == "ended" else found


@pytest.mark.soak
@pytest.mark.parametrize("world", WORLDS)
def test_a_run_killed_again_and_again_ends_with_the_bits_of_an_undisturbed_one(
    world: str, tmp_path: Path, server: ForkServer, survived: Callable[[str], None]
) -> None:
    processes, sections = WORLDS[world]
    undisturbed = toy_config(tmp_path, name="undisturbed", **RANDOM, **sections)
    reference = server.start("fit", "--config", str(undisturbed), cwd=tmp_path, processes=processes)

    config = toy_config(tmp_path, name="killed", **RANDOM, **sections)
    arguments = ["fit", "--config", str(config), "resume=auto"]
    draw = soak.draw()
    hits: Counter[str] = Counter()
    for number in range(1, KILLS + 1):
        training = server.start(*arguments, cwd=tmp_path, processes=processes)
        phase = moment(tmp_path, training, ("train", "evaluate", "save")[number % 3], draw)
        assert phase, f"ended before kill {number}:\n{training.log()}"
        training.kill()
        assert training.wait() == [-signal.SIGKILL] * processes, training.log()
        hits[phase] += 1
        assert len(record(only_run(tmp_path, "killed"))["attempts"]) == number
    last = server.run("fit", "--resume", str(only_run(tmp_path, "killed")), cwd=tmp_path, processes=processes)

    assert reference.wait() == last.wait() == [0] * processes, last.log()
    assert_same_bits(only_run(tmp_path, "killed"), only_run(tmp_path, "undisturbed"))
    steps = [entry["step"] for entry in entries(only_run(tmp_path, "killed")) if "train/loss" in entry]
    assert steps == list(range(1, steps[-1] + 1))
    attempts = [attempt["status"] for attempt in record(only_run(tmp_path, "killed"))["attempts"]]
    assert attempts == ["killed"] * KILLS + ["finished"]
    places = ", ".join(f"{count} in {phase}" for phase, count in sorted(hits.items()))
    survived(f"{KILLS} SIGKILLs of the whole group ({places}), {steps[-1]} steps: bit-identical")

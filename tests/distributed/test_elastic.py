"""A run goes on with another number of processes, another strategy: the same samples, the same numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from harness import toy_config
from outcome import entries, losses, only_run, record, state
from processes import ForkServer

SAMPLES = 203
SHARED: dict[str, Any] = {
    "model": {"name": "toy.net", "depth": 2},
    "train": {"max_epochs": 3, "ema_decay": 0.9, "clip_norm": 1.0},
    "optimizer": {"name": "adamw", "lr": 0.003},
}


def config(folder: Path, name: str, **data: Any) -> str:
    trace = str(folder / f"trace-{name}")
    return str(toy_config(folder, name=name, data={"samples": SAMPLES, "trace": trace, **data}, **SHARED))


def loads(folder: Path, name: str) -> list[Counter[int]]:
    """How often each training sample was loaded, by epoch. Without workers nothing is loaded ahead of its step."""
    lines = [line.split() for line in (folder / f"trace-{name}").read_text().splitlines()]
    epochs = sorted({int(line[0]) for line in lines})
    return [Counter(int(line[1]) for line in lines if int(line[0]) == epoch) for epoch in epochs]


def test_one_run_in_many_worlds_sees_each_sample_once_an_epoch_and_gives_the_same_losses(
    tmp_path: Path, server: ForkServer
) -> None:
    reference = server.start("fit", "--config", config(tmp_path, "steady", batch_size=24), cwd=tmp_path)
    phases = [  # processes, strategy, batch size, last step: 9 steps an epoch, the ends fall in the middle of one
        (1, "auto", 24, 4),
        (2, "ddp", 12, 7),
        (3, "fsdp", 8, 13),
        (2, "fsdp", 12, 15),
        (1, "single", 24, 17),
        (2, "fsdp", 12, 20),
        (2, "ddp", 12, 25),
        (1, "auto", 24, None),
    ]
    target = ["--config", config(tmp_path, "moving", batch_size=24)]
    for processes, strategy, batch_size, last in phases:
        overrides = [f"data.batch_size={batch_size}", f"strategy={strategy}"]
        overrides += [f"train.max_steps={last}"] if last else ["train.max_steps=null"]
        phase = server.run("fit", *target, *overrides, cwd=tmp_path, processes=processes)
        assert phase.wait() == [0] * processes, phase.log()
        target = ["--resume", str(only_run(tmp_path, "moving"))]

    assert reference.wait() == [0]
    steady, moving = only_run(tmp_path, "steady"), only_run(tmp_path, "moving")
    assert loads(tmp_path, "moving") == loads(tmp_path, "steady") == [Counter(range(SAMPLES))] * 3
    assert losses(moving) == pytest.approx(losses(steady), rel=1e-5) and len(losses(moving)) == 27
    norms = [[entry["grad_norm"] for entry in entries(run) if "grad_norm" in entry] for run in (steady, moving)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    tensors, numbers = state(steady)
    others, other_numbers = state(moving)
    assert other_numbers["progress"] == numbers["progress"]
    for name in tensors:
        if not name.startswith("random/"):
            difference = (others[name].double() - tensors[name].double()).abs().max()
            assert difference <= 1e-5 * tensors[name].double().abs().max(), name
    assert [attempt["world_size"] for attempt in record(moving)["attempts"]] == [1, 2, 3, 2, 1, 2, 2, 1]


def test_the_global_batch_is_kept_on_another_number_of_ranks(tmp_path: Path, server: ForkServer) -> None:
    """The same command each time, on 1, 2, 3 ranks in turn: micro-batches take up the difference."""
    reference = server.start("fit", "--config", config(tmp_path, "steady", batch_size=24), cwd=tmp_path)
    target = ["--config", config(tmp_path, "moving", batch_size=24)]
    for processes, last in [(1, 4), (2, 8), (3, 13), (1, 16), (3, 22), (2, None)]:
        limit = f"train.max_steps={last}" if last else "train.max_steps=null"
        phase = server.run("fit", *target, limit, cwd=tmp_path, processes=processes)
        assert phase.wait() == [0] * processes, phase.log()
        target = ["--resume", str(only_run(tmp_path, "moving"))]
    assert reference.wait() == [0]
    assert loads(tmp_path, "moving") == loads(tmp_path, "steady") == [Counter(range(SAMPLES))] * 3
    steady, moving = only_run(tmp_path, "steady"), only_run(tmp_path, "moving")
    assert losses(moving) == pytest.approx(losses(steady), rel=1e-5) and len(losses(moving)) == 27
    assert "2 process(es) in place of 3: the global batch stays 24" in phase.log()


def test_fewer_ranks_accumulate_what_more_ranks_did_at_once(tmp_path: Path, server: ForkServer) -> None:
    reference = server.start("fit", "--config", config(tmp_path, "steady", batch_size=48), cwd=tmp_path)
    target = ["--config", config(tmp_path, "moving", batch_size=8)]
    for processes, last in [(3, 4), (1, 9), (2, None)]:
        overrides = ["train.accumulate=2", f"train.max_steps={last}" if last else "train.max_steps=null"]
        phase = server.run("fit", *target, *overrides, cwd=tmp_path, processes=processes)
        assert phase.wait() == [0] * processes, phase.log()
        target = ["--resume", str(only_run(tmp_path, "moving"))]
    assert reference.wait() == [0]
    assert loads(tmp_path, "moving") == [Counter(range(SAMPLES))] * 3
    assert losses(only_run(tmp_path, "moving")) == pytest.approx(losses(only_run(tmp_path, "steady")), rel=1e-5)


def test_another_number_of_ranks_is_refused_where_that_is_asked_for(tmp_path: Path, server: ForkServer) -> None:
    path = config(tmp_path, "strict", batch_size=24)
    first = server.run("fit", "--config", path, "train.max_steps=3", "train.elastic=refuse", cwd=tmp_path)
    assert first.wait() == [0]
    command = ["fit", "--resume", str(only_run(tmp_path, "strict")), "train.max_steps=6"]
    second = server.run(*command, cwd=tmp_path, processes=2)
    assert second.wait() == [2, 2]
    (line,) = [text for text in second.log().splitlines() if text.startswith("trainer: ")]
    assert line == (
        "trainer: error: train.elastic: 2 processes × 24 × 1 accumulated are a global batch of 48, and the run had 24 "
        "with 1 processes: start as many, change data.batch_size or train.accumulate to match, or set "
        "train.elastic=accumulate"
    )
    third = server.run(*command, "data.batch_size=12", cwd=tmp_path, processes=2)
    assert third.wait() == [0, 0], third.log()


def test_a_global_batch_that_changes_on_the_way_still_covers_each_sample_once(
    tmp_path: Path, server: ForkServer
) -> None:
    target = ["--config", config(tmp_path, "growing", batch_size=7)]
    for processes, batch_size, accumulate, last in [(1, 7, 1, 5), (3, 16, 2, 7), (2, 1, 3, 30), (1, 203, 1, None)]:
        overrides = [f"data.batch_size={batch_size}", f"train.accumulate={accumulate}"]
        overrides += [f"train.max_steps={last}"] if last else ["train.max_steps=null"]
        phase = server.run("fit", *target, *overrides, cwd=tmp_path, processes=processes)
        assert phase.wait() == [0] * processes, phase.log()
        target = ["--resume", str(only_run(tmp_path, "growing"))]
    assert loads(tmp_path, "growing") == [Counter(range(SAMPLES))] * 3

"""Half precisions with several processes: every combination of strategy and precision that a config may ask for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from harness import toy_config
from outcome import only_run, state
from processes import ForkServer

COMBINATIONS = [(s, p) for s in ("ddp", "fsdp") for p in ("bf16-mixed", "16-mixed", "bf16")]


def test_every_strategy_with_every_precision(
    tmp_path: Path, run_cases: Callable[[int, Sequence[Sequence[str]]], list[int]]
) -> None:
    cases = []
    for strategy, precision in [("ddp", "32"), *COMBINATIONS]:
        train = {"precision": precision, "clip_norm": 1.0, "activation_checkpointing": "full", "ema_decay": 0.9}
        config = toy_config(tmp_path, name=f"{strategy}-{precision}", strategy={"name": strategy}, train=train)
        cases.append(["fit", "--config", str(config)])
    assert run_cases(2, cases) == [0] * len(cases)

    def losses(name: str) -> list[float]:
        (file,) = (tmp_path / "runs" / name).glob("*/metrics.jsonl")
        entries = [json.loads(line) for line in file.read_text().splitlines()]
        return [e["train/loss"] for e in entries if "train/loss" in e]

    full = losses("ddp-32")
    for strategy, precision in COMBINATIONS:
        assert losses(f"{strategy}-{precision}") == pytest.approx(full, rel=0.06), f"{strategy} {precision}"


def test_an_overflow_on_one_rank_leaves_the_step_out_on_all(tmp_path: Path, server: ForkServer) -> None:
    results = {}
    for strategy, processes, batch_size in (("single", 1, 20), ("ddp", 2, 10), ("fsdp", 2, 10)):
        config = toy_config(
            tmp_path,
            name=strategy,
            recipe={"name": "toy.overflow"},
            data={"batch_size": batch_size},
            train={"precision": "16-mixed", "max_steps": 8},
            strategy={"name": strategy},
        )
        training = server.run("fit", "--config", str(config), cwd=tmp_path, processes=processes)
        assert training.wait() == [0] * processes, training.log()
        results[strategy] = state(only_run(tmp_path, strategy))
    weights, numbers = results["single"]
    assert numbers["scaler"]["scale"] == 32768.0 and numbers["scaler"]["_growth_tracker"] == 5
    for strategy in ("ddp", "fsdp"):
        others, other_numbers = results[strategy]
        assert other_numbers["scaler"] == numbers["scaler"], strategy
        for name in weights:
            if name.startswith("model/net") or name.endswith("/step"):
                assert torch.allclose(others[name], weights[name], rtol=0.05, atol=5e-4), f"{strategy}: {name}"


def test_the_scale_is_taken_up_again_by_all_ranks(tmp_path: Path, server: ForkServer) -> None:
    for strategy in ("ddp", "fsdp"):
        sections = {"recipe": {"name": "toy.overflow"}, "strategy": {"name": strategy}}
        train = {"precision": "16-mixed", "max_steps": 5}
        config = toy_config(tmp_path, name=strategy, train=train, **sections)
        assert server.run("fit", "--config", str(config), cwd=tmp_path, processes=2).wait() == [0, 0]
        run = only_run(tmp_path, strategy)
        assert state(run)[1]["scaler"]["scale"] == 32768.0
        # The recipe counts its calls anew: one more overflow.
        again = server.run("fit", "--resume", str(run), "train.max_steps=9", cwd=tmp_path, processes=2)
        assert again.wait() == [0, 0], again.log()
        assert state(run)[1]["scaler"]["scale"] == 16384.0

"""Half precisions with several processes: every combination of strategy and precision that a config may ask for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from harness import toy_config

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

"""What a job must remember: each optimizer, precision and odd kind of weight goes on to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import toy_config
from outcome import assert_same_bits, losses, only_run, state
from stopping import stopping

from trainer.cli import main

CASES: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": {"name": "adamw"}},
    "sgd": {"optimizer": {"name": "sgd", "nesterov": True, "weight_decay": 0.1}},
    "sgd without momentum": {"optimizer": {"name": "sgd", "momentum": 0.0}},
    "muon": {"optimizer": {"name": "muon"}},
    "adamw8bit": {"optimizer": {"name": "adamw8bit", "min_8bit_size": 16}, "train": {"max_epochs": 1}},
    "bf16-mixed": {"train": {"precision": "bf16-mixed"}},
    "16-mixed": {"train": {"precision": "16-mixed"}},
    "bf16": {"train": {"precision": "bf16"}},
    "accumulated": {"train": {"accumulate": 3}},
    "wsd": {"schedule": {"name": "wsd", "warmup_steps": 3, "decay_share": 0.5}},
    "dropped tail": {"data": {"samples": 47, "drop_last": True}},
    "recomputed": {"train": {"activation_checkpointing": "full"}},
    "odd weights": {"model": {"name": "toy.odd_net"}, "optimizer": {"name": "sgd"}},
    "odd weights, adamw": {"model": {"name": "toy.odd_net"}, "optimizer": {"name": "adamw"}},
    "bad samples": {"data": {"bad": [1, 50, 51, 52], "max_bad_samples": 9}},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_and_resumed_has_the_bits_of_one_that_was_not(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections: dict[str, Any] = {"train": {"ema_decay": 0.9, "clip_norm": 0.7}, **CASES[case]}
    sections["train"] = {"ema_decay": 0.9, "clip_norm": 0.7, **sections["train"]}
    if sections.get("model", {}).get("name") is None:
        sections["model"] = {"name": "toy.net", "dropout": 0.3}
    assert main(["fit", "--config", str(toy_config(tmp_path, name="whole", **sections))]) == 0
    config = ["fit", "--config", str(toy_config(tmp_path, name="stopped", **sections)), "resume=auto"]
    with monkeypatch.context() as patch:
        stopping(patch, 5)
        assert main(config) == 75
    with monkeypatch.context() as patch:
        stopping(patch, 2)
        assert main(config) == 75
    assert main(config) == 0
    assert_same_bits(only_run(tmp_path, "stopped"), only_run(tmp_path, "whole"))
    values = losses(only_run(tmp_path, "whole"))
    assert sum(values[-3:]) < sum(values[:3]) or "8bit" in case  # it learns


def test_a_checkpoint_holds_everything_by_name(tmp_path: Path) -> None:
    sections = {"model": {"name": "toy.odd_net"}, "train": {"ema_decay": 0.9}, "data": {"workers": 1}}
    assert main(["fit", "--config", str(toy_config(tmp_path, **sections))]) == 0
    tensors, numbers = state(only_run(tmp_path))
    assert numbers["progress"] == {"step": 20, "consumed": 200, "best": None} and numbers["world_size"] == 1
    assert tensors["model/calls"].item() == tensors["model/norm.num_batches_tracked"].item() == 20
    assert torch.equal(tensors["model/head.weight"], tensors["model/tied.weight"])
    assert "optimizer/conv.weight/exp_avg" in tensors and "ema/norm.running_mean" in tensors
    assert not [name for name in tensors if name.startswith(("optimizer/frozen", "optimizer/unused", "ema/calls"))]
    assert {name for name in tensors if name.startswith("random/")} >= {"random/rank0/torch", "random/rank0/numpy"}


@pytest.mark.parametrize("change", ["train.precision=bf16", "train.precision=16-mixed", "train.ema_decay=0.5"])
def test_what_a_resume_may_change_it_can_change(change: str, tmp_path: Path) -> None:
    assert main(["fit", "--config", str(toy_config(tmp_path, train={"ema_decay": 0.9})), "train.max_steps=10"]) == 0
    run = only_run(tmp_path)
    assert main(["fit", "--resume", str(run), "train.max_steps=null", change]) == 0
    values = losses(run)
    assert len(values) == 20 and values[10] < 1.5 * values[9]
    assert main(["fit", "--resume", str(run), "train.max_epochs=3", "train.precision=32", "train.ema_decay=null"]) == 0
    assert len(losses(run)) == 30 and losses(run)[20] < 1.5 * losses(run)[19]

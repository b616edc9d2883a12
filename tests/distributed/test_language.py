"""A language model learns the same, however its global batch is cut: accumulation, processes, sharding."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm import tiny
from outcome import entries, only_run, state

from trainer.cli import main

LORA = {"adapter": {"name": "lora", "r": 4}}
HALF = {"data": {"batch_size": 2}}
FSDP = {"strategy": {"name": "fsdp"}}
# Name -> processes, and what is changed. 12 steps in global batches of 4 samples; each epoch ends with a ragged one.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "lora": (1, {**LORA, "data": {"batch_size": 4}}),
    "lora-accumulated": (1, {**LORA, "data": {"batch_size": 1}, "train": {"accumulate": 4}}),
    "lora-ddp": (2, {**LORA, **HALF}),
    "lora-ddp-accumulated": (2, {**LORA, "data": {"batch_size": 1}, "train": {"accumulate": 2}}),
    "lora-fsdp": (2, {**LORA, **HALF, **FSDP}),
    "lora-fsdp-checkpointed": (2, {**LORA, **HALF, **FSDP, "train": {"activation_checkpointing": "full"}}),
    "full": (1, {"data": {"batch_size": 4}}),
    "full-fsdp": (2, {**HALF, **FSDP}),
    "untied": (1, {"data": {"batch_size": 4}, "init_from": "untied"}),
    "untied-fsdp": (2, {**HALF, **FSDP, "init_from": "untied"}),
    "padded": (1, {**LORA, "data": {"batch_size": 4}, "recipe": {"packing": "padded"}}),
    "padded-ddp": (2, {**LORA, **HALF, "recipe": {"packing": "padded"}}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    tiny.write(folder / "base")
    tiny.write(folder / "untied", tied=False)
    draw = random.Random(0)
    with (folder / "talks.jsonl").open("w") as file:
        for _ in range(40):
            words = ["".join(draw.choices("abcde ", k=draw.randint(1, 24))).strip() or "a" for _ in range(2)]
            file.write(json.dumps({"prompt": words[0], "completion": words[1]}) + "\n")
    return folder


def _arguments(folder: Path, name: str) -> list[str]:
    sections: dict[str, Any] = {
        "name": name,
        "recipe": {"name": "language_modeling", "max_length": 64},
        "model": {"name": "causal_lm"},
        "init_from": "base",
        "data": {"name": "instructions", "path": str(folder / "talks.jsonl"), "val_fraction": 0.1},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "train": {"max_steps": 12, "max_epochs": None, "clip_norm": 1.0, "log_every": 1, "device": "cpu"},
        "evaluate": {"every_epochs": None, "every_steps": 6, "at_start": True},
        "tracking": {"enabled": False},
        "runs_dir": str(folder / "runs"),
    }
    for key, value in CASES[name][1].items():
        sections[key] = {**sections[key], **value} if isinstance(value, dict) and key in sections else value
    sections["init_from"] = str(folder / sections["init_from"])
    path = folder / f"{name}.json"
    path.write_text(json.dumps(sections))
    return ["fit", "--config", str(path)]


def test_every_cut_of_the_global_batch_gives_the_same_losses_and_weights(
    folder: Path, run_cases: Callable[[int, Sequence[Sequence[str]]], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINER_CACHE", str(folder / "cache"))
    for name, (processes, _) in CASES.items():
        if processes == 1:
            assert main(_arguments(folder, name)) == 0
    names = [name for name, (processes, _) in CASES.items() if processes == 2]
    assert run_cases(2, [_arguments(folder, name) for name in names]) == [0] * len(names)

    for name in CASES:
        kind = name.partition("-")[0]
        if name != kind:
            _assert_same(only_run(folder, name), only_run(folder, kind), name)


def _assert_same(run: Path, reference: Path, name: str) -> None:
    logged, wanted = entries(run), entries(reference)
    for metric in ("train/loss", "grad_norm", "val/loss", "val/perplexity", "val/token_accuracy"):
        values = [entry[metric] for entry in wanted if metric in entry]
        assert len(values) >= (12 if metric == "train/loss" else 2)
        assert [entry[metric] for entry in logged if metric in entry] == pytest.approx(values, rel=1e-5), (name, metric)
    first, *_, last = [entry["epoch"] for entry in wanted if "train/loss" in entry]
    assert last / 12 < first, "some steps have fewer samples: the last of each epoch is ragged"
    weights, other = _weights(reference), _weights(run)
    assert weights and weights.keys() == other.keys()
    for key in weights:
        difference = (other[key] - weights[key]).abs().max() / weights[key].abs().max()
        assert difference < 1e-5, f"{name}: {key} differs by {difference:.1e}"


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in state(run)[0].items() if key.startswith("model/")}

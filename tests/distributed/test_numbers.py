"""The numbers do not depend on how the global batch is cut: processes, accumulation, strategy."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from harness import toy_config
from processes import ForkServer
from safetensors.torch import load_file

from trainer.checkpoint import newest_whole
from trainer.cli import main
from trainer.saving import load as load_checkpoint

# 50 steps of a ragged data set: 203 samples in global batches of 64 leave one of 11 at the end of each epoch.
SHARED = {
    "recipe": {"name": "toy.recipe", "weighted": True},
    "model": {"name": "toy.net", "depth": 2},
    "train": {"max_steps": 50, "max_epochs": None, "clip_norm": 1.0, "ema_decay": 0.99},
    "optimizer": {"name": "sgd", "lr": 0.05},
    "schedule": {"name": "cosine", "warmup_steps": 5},
}
CASES = {
    "one": {"data": {"samples": 203, "batch_size": 64}},
    "accumulated": {"data": {"samples": 203, "batch_size": 32}, "train": {"accumulate": 2}},
    "ddp": {"data": {"samples": 203, "batch_size": 32}},
    "ddp-accumulated": {"data": {"samples": 203, "batch_size": 8}, "train": {"accumulate": 4}},
    "fsdp": {"data": {"samples": 203, "batch_size": 32}, "strategy": {"name": "fsdp"}},
    "fsdp-accumulated": {
        "data": {"samples": 203, "batch_size": 16},
        "train": {"accumulate": 2},
        "strategy": {"name": "fsdp"},
    },
}


def _case(folder: Path, name: str) -> list[str]:
    sections = {key: dict(value) for key, value in SHARED.items()}
    for key, value in CASES[name].items():
        sections[key] = {**sections.get(key, {}), **value}
    return ["fit", "--config", str(toy_config(folder, name=name, **sections))]


def _result(folder: Path, name: str) -> tuple[list[dict[str, float]], dict[str, list[float]]]:
    (run,) = (folder / "runs" / name).iterdir()
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    checkpoint = newest_whole(run / "checkpoints", pytest.fail)
    assert checkpoint is not None and checkpoint.manifest.step == 50
    state = load_checkpoint(checkpoint.path, checkpoint.manifest)
    weights = {f"{group}/{k}": t.double() for group in ("model", "ema") for k, t in getattr(state, group).items()}
    return entries, weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("numbers")


def test_every_cut_of_the_global_batch_gives_the_same_losses_and_weights(
    folder: Path, run_cases: Callable[[int, Sequence[Sequence[str]]], list[int]]
) -> None:
    assert main(_case(folder, "one")) == 0
    assert main(_case(folder, "accumulated")) == 0
    names = [name for name in CASES if name not in ("one", "accumulated")]
    assert run_cases(2, [_case(folder, name) for name in names]) == [0] * len(names)

    entries, weights = _result(folder, "one")
    losses = [entry["train/loss"] for entry in entries if "train/loss" in entry]
    assert len(losses) == 50 and losses[-1] < losses[0]
    for name in CASES:
        other_entries, other_weights = _result(folder, name)
        assert [e["train/loss"] for e in other_entries if "train/loss" in e] == pytest.approx(losses, rel=1e-5), name
        for metric in ("grad_norm", "lr", "val/loss", "val/accuracy", "val/count", "test/loss"):
            values = [e[metric] for e in entries if metric in e]
            assert values and [e[metric] for e in other_entries if metric in e] == pytest.approx(values, rel=1e-5), name
        assert weights.keys() == other_weights.keys()
        for key, tensor in weights.items():
            difference = (other_weights[key] - tensor).abs().max() / tensor.abs().max()
            assert difference < 1e-5, f"{name}: {key} differs by {difference:.1e}"


def test_evaluation_counts_every_sample_once(folder: Path) -> None:
    for name in CASES:
        entries, _ = _result(folder, name)
        assert {e["val/count"] for e in entries if "val/count" in e} == {101}
        assert {e["test/count"] for e in entries if "test/count" in e} == {67}


def test_an_unsharded_checkpoint_is_plain_safetensors(folder: Path) -> None:
    (run,) = (folder / "runs" / "ddp").iterdir()
    (path,) = (run / "checkpoints").glob("step-*/model.safetensors")
    assert set(load_file(path)) >= {"0.weight", "2.bias"}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_gradients_are_exchanged_on_the_last_micro_batch_only(
    strategy: str, tmp_path: Path, server: ForkServer
) -> None:
    exchanges = []
    for name, accumulate, batch_size in (("accumulated", 3, 5), ("plain", 1, 15)):
        config = toy_config(
            tmp_path,
            name=name,
            recipe={"name": "toy.watching", "out": str(tmp_path / name)},
            data={"samples": 120, "batch_size": batch_size},
            train={"accumulate": accumulate, "max_epochs": 2},
            evaluate={"every_epochs": None, "test": False},
            strategy={"name": strategy},
        )
        training = server.run("fit", "--config", str(config), cwd=tmp_path, processes=2)
        assert training.wait() == [0, 0], training.log()
        ranks = [[line.split() for line in Path(f"{tmp_path / name}.{r}").read_text().splitlines()] for r in (0, 1)]
        exchanges.append([int(count) for count, _ in ranks[0]])
        if strategy == "ddp" and accumulate == 3:  # what has been added up so far is each rank's own
            partial = [(float(a[1]), float(b[1])) for n, (a, b) in enumerate(zip(*ranks, strict=True)) if n % 3]
            assert len(partial) == 16 and all(one != other for one, other in partial)
    accumulated, plain = exchanges
    assert len(accumulated) == 24 and len(plain) == 8 and plain[1] > 0
    assert accumulated == [count for count in plain for _ in range(3)]

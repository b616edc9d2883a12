"""Each precision trains, keeps its weights in the type it promises, and scales the loss where it must."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import toy_config
from torch import nn

from trainer import checkpoint, saving
from trainer.cli import main
from trainer.component import Component
from trainer.config import Train
from trainer.engine import Engine
from trainer.state import JobState
from trainer.world import World


def fit(folder: Path, precision: str, *overrides: str, **sections: Any) -> tuple[list[float], JobState]:
    config = toy_config(folder, name=f"toy-{precision}", train={"precision": precision, "clip_norm": 1.0}, **sections)
    assert main(["fit", "--config", str(config), *overrides]) == 0
    (run,) = (folder / "runs" / f"toy-{precision}").iterdir()
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = checkpoint.newest_whole(run / "checkpoints", pytest.fail)
    assert found is not None
    return [e["train/loss"] for e in entries if "train/loss" in e], saving.load(found.path, found.manifest)


@pytest.mark.parametrize(
    ("precision", "weights", "tolerance"),
    [("bf16-mixed", torch.float32, 0.02), ("16-mixed", torch.float32, 0.01), ("bf16", torch.bfloat16, 0.05)],
)
def test_losses_stay_near_those_of_full_precision(
    tmp_path: Path, precision: str, weights: torch.dtype, tolerance: float
) -> None:
    full, _ = fit(tmp_path, "32")
    half, state = fit(tmp_path, precision)
    assert half == pytest.approx(full, rel=tolerance) and half != full
    assert {tensor.dtype for tensor in state.model.values()} == {weights}
    assert bool(state.numbers["scaler"]) == (precision == "16-mixed")


def engine(precision: Any) -> Engine:
    """An engine with one linear layer and plain SGD."""
    made = Engine(Component("strategy", "single", {}), Train(precision=precision, device="cpu", max_steps=1), World())
    torch.manual_seed(0)

    def build(model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(model.parameters(), lr=0.1)]

    made.setup(nn.Linear(3, 2), build)
    return made


def test_an_overflow_leaves_the_step_out_and_lowers_the_scale() -> None:
    floor = engine("16-mixed")
    scale = floor.precision.state_dict()["scale"]
    for factor, moves in ((1e-3, True), (math.inf, False)):
        before = [p.detach().clone() for p in floor.bare.parameters()]
        with floor.forward_context():
            loss = floor.model(torch.ones(4, 3)).float().square().sum()
        floor.backward(loss, factor)
        floor.finish_gradients(1.0)
        floor.step()
        changed = any(not torch.equal(a, b) for a, b in zip(before, floor.bare.parameters(), strict=True))
        assert changed == moves
    assert floor.precision.state_dict()["scale"] == scale / 2


def test_gradients_under_loss_scaling_are_those_without() -> None:
    norms = []
    for precision in ("32", "16-mixed"):
        floor = engine(precision)
        with floor.forward_context():
            loss = floor.model(torch.ones(4, 3)).float().square().sum()
        floor.backward(loss, 0.5)
        floor.finish_gradients(2.0)
        norms.append([p.grad.norm().item() for p in floor.bare.parameters() if p.grad is not None])
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)


def test_the_scale_is_taken_up_again(tmp_path: Path) -> None:
    _, whole = fit(tmp_path, "16-mixed", "train.max_epochs=3")
    half = tmp_path / "half"
    half.mkdir()
    _, first = fit(half, "16-mixed", "train.max_epochs=1")
    assert first.numbers["scaler"]["_growth_tracker"] == 10
    (run,) = (half / "runs" / "toy-16-mixed").iterdir()
    assert main(["fit", "--resume", str(run), "train.max_epochs=3"]) == 0
    found = checkpoint.newest_whole(run / "checkpoints", pytest.fail)
    assert found is not None
    second = saving.load(found.path, found.manifest)
    assert second.numbers["scaler"] == whole.numbers["scaler"]
    assert all(torch.equal(second.model[name], tensor) for name, tensor in whole.model.items())

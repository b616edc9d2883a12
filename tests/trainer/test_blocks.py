"""Blocks of real models; activation checkpointing and compilation change memory and speed, not numbers."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torchvision import models
from toy import net

import recipes.models.mlp
from recipes.vision.images import ImageInfo
from trainer.blocks import apply_activation_checkpointing, compile_blocks, find_blocks
from trainer.component import Component
from trainer.config import Train
from trainer.engine import Engine
from trainer.errors import UserError
from trainer.world import World

INFO = ImageInfo(("a", "b", "c"), (1, 1, 1), 1, 8, 8, (0.5,), (0.5,))


def _mlp(**options: object) -> nn.Module:
    return recipes.models.mlp.build(recipes.models.mlp.Config(**options), INFO)  # type: ignore[arg-type]


def _resnet_names() -> list[str]:
    return [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]


def _efficientnet_names() -> list[str]:
    depths = {1: 1, 2: 2, 3: 2, 4: 3, 5: 3, 6: 4, 7: 1}
    inner = [f"features.{stage}.{block}" for stage, depth in depths.items() for block in range(depth)]
    return ["features.0", *inner, "features.8", "classifier"]


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (_mlp, ["blocks.0", "blocks.1"]),
        (lambda: net.build(net.Config(depth=3)), ["1.0", "1.1", "1.2"]),
        (models.resnet18, _resnet_names()),
        (models.vit_b_16, [*(f"encoder.layers.encoder_layer_{i}" for i in range(12)), "heads"]),
        (models.efficientnet_b0, _efficientnet_names()),
    ],
)
def test_blocks_of_a_model(build: Callable[[], nn.Module], names: list[str]) -> None:
    with torch.device("meta"):  # names only: no weights are drawn
        model = build()
    blocks = find_blocks(model)
    assert list(blocks) == names
    assert all(model.get_submodule(name) is block for name, block in blocks.items())


def test_a_bare_layer_has_no_blocks() -> None:
    assert find_blocks(nn.Linear(2, 2)) == {}


class Residual(nn.Module):
    """Layers with dropout and batch statistics."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.BatchNorm1d(2 * width), nn.GELU())
        self.outer = nn.Sequential(nn.Dropout(0.3), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(x))


class Deep(nn.Module):
    def __init__(self, width: int = 16, depth: int = 24) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Residual(width) for _ in range(depth))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def _pass(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one forward and backward pass with fixed randomness, then gradients and buffers by name."""
    torch.manual_seed(1)
    loss = model(x).square().mean()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients | dict(model.named_buffers())


@pytest.mark.parametrize(
    ("which", "names"),
    [
        ("none", []),
        ("full", [f"layers.{i}" for i in range(5)]),
        (r"layers\.[13]", ["layers.1", "layers.3"]),
        (r"layers\.0(\.inner)?", ["layers.0"]),  # what lies inside of a chosen one is not wrapped again
        (r".*\.inner", [f"layers.{i}.inner" for i in range(5)]),
    ],
)
def test_checkpointing_leaves_loss_gradients_and_statistics_alone(which: str, names: list[str]) -> None:
    torch.manual_seed(0)
    model, x = Deep(depth=5), torch.randn(8, 16)
    other = copy.deepcopy(model)
    assert apply_activation_checkpointing(other, which) == names
    assert list(other.state_dict()) == list(model.state_dict())

    for _ in range(2):
        loss, tensors = _pass(model, x)
        other_loss, other_tensors = _pass(other, x)
        assert torch.equal(loss, other_loss)
        assert tensors.keys() == other_tensors.keys()
        assert all(torch.equal(tensors[name], other_tensors[name]) for name in tensors)
    assert model.layers[0].inner[1].num_batches_tracked == 2


def test_checkpointing_of_a_model_with_blocks_of_convolutions() -> None:
    torch.manual_seed(0)
    model, x = models.resnet18(num_classes=3), torch.randn(4, 3, 32, 32)
    other = copy.deepcopy(model)
    assert apply_activation_checkpointing(other, "full") == _resnet_names()
    loss, tensors = _pass(model, x)
    other_loss, other_tensors = _pass(other, x)
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(tensors[name], other_tensors[name]) for name in tensors)


@pytest.mark.parametrize("which", ["layer", "layers", r"layers\.5", "LAYERS.*"])
def test_an_expression_without_a_match_names_the_blocks(which: str) -> None:
    with pytest.raises(UserError, match=r"activation_checkpointing: no module .*layers\.0, layers\.1$"):
        apply_activation_checkpointing(Deep(depth=2), which)


def _peak_bytes(work: Callable[[], object], trace: Path) -> int:
    """Most bytes that `work` has allocated at once, as torch's allocator reports them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_bytes())["traceEvents"] if event["name"] == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


def test_checkpointing_lowers_the_peak_of_activation_memory(tmp_path: Path) -> None:
    peaks = {}
    for which in ("none", "full", r"layers\.\d*[02468]"):
        engine = Engine(
            Component("strategy", "single", {}), Train(device="cpu", activation_checkpointing=which), World()
        )
        engine.setup(Deep(), lambda model: [torch.optim.SGD(model.parameters(), lr=0.1)])
        x = torch.randn(512, 16)

        def step(engine: Engine = engine, x: Tensor = x) -> None:
            engine.backward(engine.model(x).square().sum(), 1.0)

        step()  # allocates the gradients, which are no activations
        peaks[which] = _peak_bytes(step, tmp_path / "trace.json")
    assert peaks["full"] < 0.6 * peaks["none"]
    assert peaks["full"] < peaks[r"layers\.\d*[02468]"] < 0.75 * peaks["none"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.parametrize("which", ["none", "full"])
def test_compiled_blocks_give_the_same_numbers(which: str) -> None:
    torch.manual_seed(0)
    model, x = _mlp(widths=[8, 8]), torch.randn(4, 1, 8, 8)
    compiled = copy.deepcopy(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_blocks(compiled)
    apply_activation_checkpointing(compiled, which)
    assert list(compiled.state_dict()) == list(model.state_dict())
    loss, tensors = _pass(model, x)
    other_loss, other_tensors = _pass(compiled, x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # it did compile
    torch.testing.assert_close(other_loss, loss)
    torch.testing.assert_close(other_tensors, tensors)

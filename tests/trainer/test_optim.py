"""Optimizers against torch's own, parameter groups, schedules at their corners."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from trainer.errors import UserError
from trainer.optim import parameter_groups
from trainer.optimizers import adamw, adamw8bit, muon, sgd


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 8), nn.LayerNorm(8)
    )


def test_norms_and_biases_are_not_decayed() -> None:
    model = network()
    decayed, plain = parameter_groups(model, 0.1, 0.5)
    assert [p.ndim for p in decayed["params"]] == [4, 2]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.5, 0.0)
    assert len(plain["params"]) == 8
    assert sum(len(group["params"]) for group in (decayed, plain)) == len(list(model.parameters()))


def test_tied_and_frozen_parameters() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 5), "frozen": nn.Linear(2, 2)})
    model["head"].weight = model["embedding"].weight
    model["frozen"].requires_grad_(False)
    groups = parameter_groups(model, 0.1, 0.1)
    assert [len(group["params"]) for group in groups] == [1, 1]


def test_a_tied_weight_belongs_to_its_first_owner() -> None:
    model = nn.ModuleDict({"norm": nn.LayerNorm([3, 3]), "linear": nn.Linear(3, 3, bias=False)})
    model["linear"].weight = model["norm"].weight
    (group,) = parameter_groups(model, 0.1, 0.1)
    assert group["weight_decay"] == 0.0 and len(group["params"]) == 2


def test_a_model_without_a_trainable_weight_is_refused() -> None:
    with pytest.raises(UserError, match="none of its weights is trainable"):
        adamw.build(adamw.Config(), network().requires_grad_(False))


def test_muon_where_only_the_hidden_matrices_are_trainable() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    for layer in (model[0], model[2]):
        layer.requires_grad_(False)
    (matrices,) = muon.build(muon.Config(), model)
    assert matrices.param_groups[0]["params"] == [model[1].weight]


def _train(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int = 5) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        model(torch.randn(6, 1, 4, 4, generator=draw)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_same_weights_as_torch(name: str) -> None:
    model, reference = network(), network()
    matrices = [p for p in reference.parameters() if p.ndim > 1]
    vectors = [p for p in reference.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    if name == "adamw":
        # The convolution's bias before batch norm has no gradient but rounding errors: eps must outweigh them.
        options = {"lr": 0.01, "eps": 1e-3}
        config = adamw.Config(**options, beta2=0.95, weight_decay=0.1)
        mine, other = adamw.build(config, model), torch.optim.AdamW(groups, **options, betas=(0.9, 0.95), fused=False)
    else:
        nesterov = sgd.Config(lr=0.01, nesterov=True, weight_decay=0.1)
        mine, other = sgd.build(nesterov, model), torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True)
    for got, wanted in zip(_train(model, mine), _train(reference, [other]), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    matrices, rest = muon.build(muon.Config(lr=0.05, adamw_lr=0.01), model)
    assert [p.shape for g in matrices.param_groups for p in g["params"]] == [(8, 8)]
    assert sum(len(g["params"]) for g in rest.param_groups) == 5
    assert {g["base_lr"] for g in matrices.param_groups} == {0.05} and {g["lr"] for g in rest.param_groups} == {0.01}
    before = [p.detach().clone() for p in model.parameters()]
    assert all(not torch.equal(a, b) for a, b in zip(before, _train(model, [matrices, rest]), strict=True))
    with pytest.raises(UserError, match="hidden linear layers"):
        muon.build(muon.Config(), nn.Linear(3, 3))


def test_adamw_with_8_bit_state_stays_near_adamw() -> None:
    model, reference = network(), network()
    low = adamw8bit.build(adamw8bit.Config(lr=0.01, min_8bit_size=16), model)
    got = _train(model, low, steps=2)
    wanted = _train(reference, adamw.build(adamw.Config(lr=0.01), reference), steps=2)
    assert any(state["state1"].dtype == torch.uint8 for state in low[0].state.values())
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.01)


def _schedule(name: str, total_steps: int, **options: float) -> Callable[[int], float]:
    module = importlib.import_module(f"trainer.schedules.{name}")
    factor: Callable[[int], float] = module.build(module.Config(**options), total_steps)
    return factor


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "wsd"])
def test_every_schedule_warms_up_and_stays_in_bounds(name: str) -> None:
    factor = _schedule(name, 100, warmup_steps=10)
    assert [factor(step) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])
    for total, warmup in ((1, 0), (1, 5), (3, 3), (5, 50)):
        values = [_schedule(name, total, warmup_steps=warmup)(step) for step in range(total + 2)]
        assert all(0 <= value <= 1 and math.isfinite(value) for value in values)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_decaying_schedules_end_at_their_final_share(name: str) -> None:
    factor = _schedule(name, 100, warmup_steps=10, final=0.1)
    assert factor(99) == pytest.approx(0.1)
    assert factor(10) == pytest.approx(1.0)
    values = [factor(step) for step in range(10, 100)]
    assert values == sorted(values, reverse=True)


def test_shapes_of_schedules() -> None:
    assert _schedule("constant", 10)(9) == 1.0
    assert _schedule("linear", 101)(50) == pytest.approx(0.5)
    cosine = _schedule("cosine", 101)
    assert cosine(25) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    wsd = _schedule("wsd", 100, decay_share=0.2)
    assert wsd(79) == 1.0 and wsd(89) == pytest.approx(0.5) and wsd(99) == pytest.approx(0.0)

"""The floor under the loop, for one process; several are in tests/distributed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.component import Component
from trainer.config import Train
from trainer.engine import Engine
from trainer.errors import TrainerError, UserError
from trainer.world import World


def engine(**train: object) -> Engine:
    options = {"device": "cpu", "max_steps": 1, **train}
    return Engine(Component("strategy", "auto", {}), Train(**options), World())  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator")
def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"train.device: cuda is not available on this machine; use auto or cpu"):
        engine(device="cuda")


def test_one_process_has_nobody_to_talk_to() -> None:
    floor = engine()
    assert floor.from_main("x") == "x" and floor.gather("x") == ["x"] and floor.on_main(lambda: "x") == "x"
    assert floor.add_up([1.0, 2.5]).wait() == [1.0, 2.5] and floor.control_group is None and not floor.sharded

    def fail() -> None:
        raise TrainerError("no")

    with pytest.raises(TrainerError, match="no"):
        floor.on_main(fail)


def test_gradients_are_those_of_the_loss_times_the_factors() -> None:
    floor = engine(clip_norm=1e9)
    floor.setup(nn.Linear(3, 1, bias=False), lambda model: [torch.optim.SGD(model.parameters(), lr=1.0)])
    x = torch.tensor([[1.0, 2.0, 4.0]])
    for _ in range(2):
        floor.backward(floor.model(x).sum(), 0.25)
    norm = floor.finish_gradients(4.0)
    assert torch.allclose(floor.bare.weight.grad, 2 * x) and norm == pytest.approx(2 * 21**0.5)
    before = floor.bare.weight.detach().clone()
    floor.step()
    assert torch.allclose(before - floor.bare.weight, 2 * x) and floor.bare.weight.grad is None


def test_clipping_bounds_the_norm_and_tells_the_one_before() -> None:
    floor = engine(clip_norm=0.5)
    floor.setup(nn.Linear(3, 1), lambda model: [torch.optim.SGD(model.parameters(), lr=1.0)])
    floor.backward(floor.model(torch.full((1, 3), 100.0)).sum(), 1.0)
    assert floor.finish_gradients(1.0) == pytest.approx(30001**0.5)
    total = sum(float(p.grad.square().sum()) for p in floor.bare.parameters()) ** 0.5  # type: ignore[union-attr]
    assert total == pytest.approx(0.5, rel=1e-4)


def test_every_group_keeps_its_own_base_rate() -> None:
    floor = engine()

    def build(model: nn.Module) -> list[torch.optim.Optimizer]:
        weight, bias = model.parameters()
        groups = [{"params": [weight], "lr": 1.0, "base_lr": 1.0}, {"params": [bias], "lr": 0.1, "base_lr": 0.1}]
        return [torch.optim.SGD(groups)]

    floor.setup(nn.Linear(2, 2), build)
    assert floor.set_learning_rate(0.5) == 0.5
    assert floor.set_learning_rate(0.25) == 0.25  # of the base rate, not of the last one
    assert [group["lr"] for group in floor.optimizers[0].param_groups] == [0.25, 0.025]


def test_half_precision_weights_want_half_precision_inputs() -> None:
    floor = engine(precision="bf16")
    floor.setup(nn.Linear(2, 2), lambda model: [])
    batch = {"x": torch.ones(1, 2), "label": torch.tensor([1]), "bad": [(3, "why")]}
    cast = floor.cast(batch)
    assert cast["x"].dtype == torch.bfloat16 and cast["label"].dtype == torch.int64 and cast["bad"] == [(3, "why")]
    with floor.forward_context():
        assert floor.model(cast["x"]).dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32


def test_threads_are_as_many_as_the_config_says() -> None:
    before = torch.get_num_threads()
    try:
        engine()
        assert torch.get_num_threads() == before
        engine(threads=before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)

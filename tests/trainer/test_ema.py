"""The average of the weights against its formula, and in place of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.ema import WeightAverage


def test_follows_its_formula_and_gives_the_weights_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average = WeightAverage(model.state_dict(keep_vars=True), 0.9)
    expected = {k: v.clone() for k, v in model.state_dict().items() if v.is_floating_point()}
    for step in range(1, 30):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(5, 3))
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
    assert "1.num_batches_tracked" not in average.tensors
    for name, value in expected.items():
        torch.testing.assert_close(average.tensors[name], value)
    live = {k: v.clone() for k, v in model.state_dict().items()}
    with average.in_place_of_weights():
        for name, value in expected.items():
            torch.testing.assert_close(model.state_dict()[name], value)
    for name, value in live.items():
        assert torch.equal(model.state_dict()[name], value), "the weights come back bit by bit"


def test_the_average_of_half_precision_weights_moves_by_less_than_they_can_tell() -> None:
    model = nn.Linear(4, 4).to(torch.bfloat16)
    average = WeightAverage(model.state_dict(keep_vars=True), 0.999)
    with torch.no_grad():
        model.weight.fill_(1.0)
        average.tensors["weight"].fill_(0.9)
    for step in range(10_000, 11_000):
        average.update(step)
    torch.testing.assert_close(average.tensors["weight"], torch.full((4, 4), 1 - 0.1 * 0.999**1000))
    before = average.tensors["weight"].clone()
    with average.in_place_of_weights():
        assert model.weight.dtype == torch.bfloat16 and 0.95 < model.weight[0, 0] < 1
    assert torch.equal(model.weight, torch.ones(4, 4, dtype=torch.bfloat16))
    assert torch.equal(average.tensors["weight"], before)


def test_weights_come_back_after_an_error() -> None:
    model = nn.Linear(2, 2)
    average = WeightAverage(model.state_dict(keep_vars=True), 0.5)
    live = model.weight.detach().clone().add_(1)
    with torch.no_grad():
        model.weight.copy_(live)
    with pytest.raises(ZeroDivisionError), average.in_place_of_weights():
        assert not torch.equal(model.weight, live)
        raise ZeroDivisionError
    assert torch.equal(model.weight, live)

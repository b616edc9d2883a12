"""The average of the weights against its formula, and in place of the weights."""

from __future__ import annotations

import torch
from torch import nn

from trainer.ema import WeightAverage


def test_follows_its_formula_and_gives_the_weights_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average = WeightAverage(model, 0.9)
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

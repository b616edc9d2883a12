"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn

from trainer.optim import parameter_groups


@dataclass(frozen=True)
class Config:
    lr: Annotated[float, "> 0"] = 0.1
    """Base learning rate."""
    momentum: Annotated[float, ">= 0", "< 1"] = 0.9
    """Momentum; 0 switches it off."""
    nesterov: bool = False
    """Nesterov's form of momentum."""
    weight_decay: Annotated[float, ">= 0"] = 0.0
    """Weight decay (L2); not applied to norms and biases."""

    def __post_init__(self) -> None:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: needs momentum > 0")


def build(config: Config, model: nn.Module) -> list[torch.optim.Optimizer]:
    groups = parameter_groups(model, config.lr, config.weight_decay)
    return [torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.nesterov, foreach=True)]

"""Muon (Jordan et al. 2024) for the hidden weight matrices, AdamW for everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn

from trainer.errors import UserError
from trainer.optim import parameter_groups


@dataclass(frozen=True)
class Config:
    lr: Annotated[float, "> 0"] = 0.02
    """Base learning rate of Muon's matrices."""
    momentum: Annotated[float, ">= 0", "< 1"] = 0.95
    """Momentum of Muon."""
    weight_decay: Annotated[float, ">= 0"] = 0.01
    """Decoupled weight decay; not applied to norms and biases."""
    adamw_lr: Annotated[float, "> 0"] = 1e-3
    """Base learning rate of AdamW for the first and last layers, convolutions, norms and biases."""


def build(config: Config, model: nn.Module) -> list[torch.optim.Optimizer]:
    if any(hasattr(p, "device_mesh") for p in model.parameters()):
        raise UserError("optimizer: muon needs whole matrices and does not run under strategy fsdp; use ddp or adamw")
    linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    # Source: the authors keep embedding and output layers out (github.com/KellerJordan/Muon, README).
    hidden = {id(weight) for weight in linear[1:-1] if weight.requires_grad}
    if not hidden:
        raise UserError("optimizer: muon needs hidden linear layers and the model has none; use adamw or sgd")
    groups = parameter_groups(model, config.lr, config.weight_decay)
    muon = [{**g, "params": [p for p in g["params"] if id(p) in hidden]} for g in groups]
    rest = [
        {
            **g,
            "params": [p for p in g["params"] if id(p) not in hidden],
            "lr": config.adamw_lr,
            "base_lr": config.adamw_lr,
        }
        for g in groups
    ]
    rest = [g for g in rest if g["params"]]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon([g for g in muon if g["params"]], momentum=config.momentum)
    ]
    if rest:
        fused = rest[0]["params"][0].device.type in ("cpu", "cuda")
        optimizers.append(torch.optim.AdamW(rest, fused=fused))
    return optimizers

"""AdamW with 8-bit state (Dettmers et al. 2022), by bitsandbytes: a quarter of AdamW's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import nn

from trainer.errors import UserError
from trainer.optim import parameter_groups


@dataclass(frozen=True)
class Config:
    lr: Annotated[float, "> 0"] = 1e-3
    """Base learning rate."""
    beta1: Annotated[float, ">= 0", "< 1"] = 0.9
    """Decay of the average of gradients."""
    beta2: Annotated[float, ">= 0", "< 1"] = 0.999
    """Decay of the average of squared gradients."""
    eps: Annotated[float, "> 0"] = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, ">= 0"] = 0.01
    """Decoupled weight decay; not applied to norms and biases."""
    min_8bit_size: Annotated[int, ">= 0"] = 4096
    """Parameters with fewer elements keep their state in 32 bits."""


def build(config: Config, model: nn.Module) -> list[torch.optim.Optimizer]:
    if any(hasattr(p, "device_mesh") for p in model.parameters()):
        raise UserError("optimizer: adamw8bit keeps its state in blocks of a whole tensor and does not run under fsdp")
    import bitsandbytes

    groups = parameter_groups(model, config.lr, config.weight_decay)
    betas = (config.beta1, config.beta2)
    make: Any = bitsandbytes.optim.AdamW8bit  # carries no types
    return [make(groups, betas=betas, eps=config.eps, min_8bit_size=config.min_8bit_size)]

"""What all optimizers and schedules share: parameter groups and warm-up."""

from __future__ import annotations

from typing import Any

from torch import nn

from trainer.errors import UserError


def parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, with and without weight decay; norms, biases and other vectors are not decayed."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    seen: set[int] = set()  # a tied parameter is met twice: it belongs to the group of its first owner
    for module in model.modules():
        is_norm = "Norm" in type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            exempt = is_norm or parameter.ndim <= 1 or name == "bias" or name.endswith("_bias")
            (plain if exempt else decayed).append(parameter)
    if not seen:
        raise UserError("model: none of its weights is trainable, so there is nothing to learn")
    return [
        {"params": parameters, "weight_decay": decay, "lr": lr, "base_lr": lr}
        for parameters, decay in ((decayed, weight_decay), (plain, 0.0))
        if parameters
    ]


def warmup(step: int, warmup_steps: int) -> float:
    """Linear ramp: 1/warmup_steps at step 0, 1 from step warmup_steps - 1 on."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def progress_after_warmup(step: int, warmup_steps: int, total_steps: int) -> float:
    """0 at the end of warm-up, 1 at the last step."""
    return min(1.0, max(0.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)))

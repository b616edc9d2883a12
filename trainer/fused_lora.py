"""LoRA's two small products folded into the large one: fewer passes over memory, the same numbers.

PEFT computes `base(x) + B(A(dropout(x))) * scaling` as separate operations: three tensors as large as the output are
made for each layer, and again in the backward pass. Here the product is added where the output lies already (as Unsloth
does on GPUs), and backward keeps `x` and `x A` only. A layer with dropout, DoRA, several adapters, a merged adapter or
a type of weight that is not plain keeps PEFT's own forward.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def fuse(model: nn.Module) -> int:
    """Give the LoRA layers of a PEFT model this forward where it applies; returns how many got it."""
    from peft.tuners.lora import Linear

    fused = 0
    module: Any
    for module in model.modules():
        if type(module) is Linear and _is_plain(module):
            module.forward = partial(_forward, module, module.forward)  # type: ignore[method-assign]
            fused += 1
    return fused


def _is_plain(layer: Any) -> bool:
    name = layer.active_adapters[0] if len(layer.active_adapters) == 1 else None
    return (
        name in layer.lora_A
        and len(layer.lora_A) == 1
        and type(layer.base_layer) is nn.Linear
        and type(layer.lora_dropout[name]) is nn.Identity
        and name not in layer.lora_variant
        and layer.lora_B[name].bias is None
        and not layer.fan_in_fan_out
    )


def _forward(layer: Any, peft_forward: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if layer.disable_adapters or layer.merged or args or kwargs:
        result: Tensor = peft_forward(x, *args, **kwargs)
        return result
    base, (name,) = layer.base_layer, layer.active_adapters
    first, second = layer.lora_A[name].weight, layer.lora_B[name].weight
    if torch.is_autocast_enabled(x.device.type):
        kind = torch.get_autocast_dtype(x.device.type)
    elif first.dtype == base.weight.dtype:
        kind = x.dtype
    else:
        return peft_forward(x)  # type: ignore[no-any-return]
    with torch.autocast(x.device.type, enabled=False):
        bias = base.bias.to(kind) if base.bias is not None else None
        operands = (value.to(kind) for value in (x, base.weight, first, second))
        fused: Tensor = _LoraLinear.apply(*operands, bias, layer.scaling[name])
        return fused


class _LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + b + s (x Aᵀ) Bᵀ, with W and b frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, first: Tensor, second: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        flat = x.flatten(0, -2)
        small = flat @ first.T
        result = F.linear(flat, weight, bias)
        result.addmm_(small, second.T, alpha=scale)
        ctx.save_for_backward(flat, small, weight, first, second)
        ctx.scale = scale
        return result.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        flat, small, weight, first, second = ctx.saved_tensors
        gradient = grad_outputs[0].flatten(0, -2)
        inner = gradient @ second
        inner *= ctx.scale
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = gradient @ weight
            grad_x.addmm_(inner, first)
            grad_x = grad_x.view(*grad_outputs[0].shape[:-1], weight.shape[1])
        grad_second = (gradient.T @ small) * ctx.scale
        return grad_x, None, inner.T @ flat, grad_second, None, None

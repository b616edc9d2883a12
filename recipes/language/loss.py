"""Cross-entropy over a large vocabulary without its logits: in chunks, with the gradient made in the forward pass.

The logits of a micro-batch are its largest tensor by far (2,000 tokens × 128,000 words × 4 bytes = 1 GB, twice with
their gradient). Here a chunk of positions at a time becomes logits, then, in the same memory, their gradient, then the
gradient of the hidden states, which is small (Hsu et al. 2024, "Liger Kernel"). Nothing is computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 16 << 20
"""Of logits in fp32 that are held at a time: few enough to stay near the processor, enough to fill it."""


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Sum over N positions of the cross-entropy of `hidden @ weight.T + bias`; a scalar in fp32.

    Args:
        hidden: [N, D], of the positions that have a target.
        weight: [V, D] of the output layer; also gets a gradient where it is trained.
        targets: [N], int64, each in 0..V-1.
        bias: [V].
    """
    result: Tensor = _SummedCrossEntropy.apply(hidden, weight, bias, targets)
    return result


@torch.no_grad()
def score(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy [N] in fp32, and whether the likeliest token is the target [N], for each position."""
    losses, hits = hidden.new_zeros(len(hidden), dtype=torch.float32), torch.zeros_like(targets, dtype=torch.bool)
    for part in _chunks(hidden, weight):
        logits = _logits(hidden[part], weight, bias).log_softmax(1)
        losses[part] = -logits.gather(1, targets[part, None])[:, 0]
        hits[part] = logits.argmax(1) == targets[part]
    return losses, hits


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        wants = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if wants[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants[2] and bias is not None else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for part in _chunks(hidden, weight):
            inputs = hidden[part]
            logits = _logits(inputs, weight, bias)
            wanted = targets[part, None]
            # Not logits minus their logsumexp: of a token that is nearly certain, rounding would leave nothing
            logits = logits.log_softmax(1)
            total -= logits.gather(1, wanted).sum()
            if not any(wants):
                continue
            gradient = logits.exp_()
            gradient.scatter_add_(1, wanted, gradient.new_full((), -1.0).expand_as(wanted))
            gradient = gradient.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = gradient @ weight
            if grad_weight is not None:
                grad_weight += gradient.T @ inputs.to(weight.dtype)
            if grad_bias is not None:
                grad_bias += gradient.sum(0)
        ctx.gradients = grad_hidden, grad_weight, grad_bias
        ctx.types = weight.dtype, bias.dtype if bias is not None else None
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = grad_outputs
        grad_hidden, grad_weight, grad_bias = ctx.gradients
        ctx.gradients = None
        weight_type, bias_type = ctx.types
        return (
            grad_hidden.mul_(factor) if grad_hidden is not None else None,
            grad_weight.mul_(factor).to(weight_type) if grad_weight is not None else None,
            grad_bias.mul_(factor).to(bias_type) if grad_bias is not None else None,
            None,
        )


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    rows = max(1, CHUNK_BYTES // (4 * len(weight)))
    return [slice(start, start + rows) for start in range(0, len(hidden), rows)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[rows, V] in fp32, in memory of their own."""
    kind = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        kind = torch.get_autocast_dtype(hidden.device.type)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.to(kind) @ weight.to(kind).T
        logits = logits.float()
        return logits if bias is None else logits + bias

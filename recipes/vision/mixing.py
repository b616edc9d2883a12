"""Mixing the samples of a batch: mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Beta


def mix(images: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, Tensor, float]:
    """Mix each picture with another one of the batch, by one draw for the whole batch.

    Everything is drawn from torch's global CPU generator, whose state is part of a checkpoint.

    Args:
        images: [N, C, H, W], floating point.
        mixup, cutmix: parameter of the Beta distribution; 0 switches a method off. With both on, a coin decides.

    Returns:
        Mixed pictures; the index [N] of each one's partner; the weight of the picture's own label.
    """
    # Types are given, since torch's default type is a half one where the weights are.
    use_cutmix = cutmix > 0 and (mixup == 0 or float(torch.rand((), dtype=torch.float64)) < 0.5)
    alpha = torch.tensor(cutmix if use_cutmix else mixup, dtype=torch.float64)
    own = float(Beta(alpha, alpha, validate_args=False).sample())
    partner = torch.randperm(len(images)).to(images.device)
    if not use_cutmix:
        return torch.lerp(images[partner], images, own), partner, own
    height, width = images.shape[2:]
    top, bottom = _interval(height, math.sqrt(1 - own))
    left, right = _interval(width, math.sqrt(1 - own))
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
    return mixed, partner, 1 - (bottom - top) * (right - left) / (height * width)


def _interval(length: int, part: float) -> tuple[int, int]:
    """`part` of `length` around a random centre, cut off at the borders."""
    centre, half = int(torch.randint(length, ())), int(length * part) // 2
    return max(0, centre - half), min(length, centre + half)

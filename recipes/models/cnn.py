"""A small residual convnet for pictures of 8×8 to 64×64 pixels, with GroupNorm: no batch statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated

from torch import Tensor, nn
from torch.nn import functional as F

from recipes.vision.images import ImageInfo

_GROUPS = 8


@dataclass(frozen=True)
class Config:
    widths: list[int] = field(default_factory=lambda: [32, 64, 128])
    """Channels of each block; every block after the first halves height and width."""
    dropout: Annotated[float, ">= 0", "< 1"] = 0.0
    """Part of the features before the last layer left out in training."""

    def __post_init__(self) -> None:
        if not self.widths or any(width < 1 for width in self.widths):
            raise ValueError("widths: needs at least one width, and each must be at least 1")


class Block(nn.Module):
    """Two 3×3 convolutions with GroupNorm and a shortcut (He et al. 2016, in the pre-activation order)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = _norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = _norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(x))
        return self.shortcut(x) + self.conv2(F.relu(self.norm2(self.conv1(x))))  # type: ignore[no-any-return]


class CNN(nn.Module):
    """[N, C, H, W] to logits [N, num_classes]."""

    def __init__(self, config: Config, info: ImageInfo) -> None:
        super().__init__()
        widths = config.widths
        self.stem = nn.Conv2d(info.channels, widths[0], 3, padding=1, bias=False)
        self.blocks = nn.Sequential(
            Block(widths[0], widths[0], 1),
            *(Block(inputs, outputs, 2) for inputs, outputs in pairwise(widths)),
        )
        self.norm = _norm(widths[-1])
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(widths[-1], info.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.norm(self.blocks(self.stem(images))))
        return self.head(self.dropout(features.mean((2, 3))))  # type: ignore[no-any-return]


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(channels, _GROUPS), channels)


def build(config: Config, info: ImageInfo) -> nn.Module:
    return CNN(config, info)

"""A multilayer perceptron on the pixels, without batch statistics."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Literal

from torch import Tensor, nn

from recipes.vision.images import ImageInfo

_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


@dataclass(frozen=True)
class Config:
    widths: list[int] = field(default_factory=lambda: [256, 256])
    """Units of each hidden layer."""
    dropout: Annotated[float, ">= 0", "< 1"] = 0.0
    """Part of each hidden layer's units left out in training."""
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """What follows each hidden layer."""

    def __post_init__(self) -> None:
        if any(width < 1 for width in self.widths):
            raise ValueError("widths: each must be at least 1")


class Block(nn.Module):
    """Linear, activation, dropout."""

    def __init__(self, inputs: int, width: int, config: Config) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, width)
        self.activation = _ACTIVATIONS[config.activation]()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.activation(self.linear(x)))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """[N, C, H, W] to logits [N, num_classes]."""

    def __init__(self, config: Config, info: ImageInfo) -> None:
        super().__init__()
        sizes = [info.channels * info.height * info.width, *config.widths]
        self.blocks = nn.Sequential(*(Block(inputs, width, config) for inputs, width in pairwise(sizes)))
        self.head = nn.Linear(sizes[-1], info.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(images.flatten(1)))  # type: ignore[no-any-return]


def build(config: Config, info: ImageInfo) -> nn.Module:
    return MLP(config, info)

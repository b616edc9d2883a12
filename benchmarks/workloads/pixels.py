"""Random uint8 pictures in memory: a batch is two lookups, and one tick of the benchmark's clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from recipes.vision.images import ImageInfo, ImageSplits
from trainer.task import Batch
from workloads import turns

MEAN, STD, NUM_CLASSES = 0.5, 0.25, 10


@dataclass(frozen=True)
class Config:
    channels: Annotated[int, ">= 1"] = 3
    """Channels of a picture."""
    size: Annotated[int, ">= 1"] = 32
    """Height and width of a picture, pixels."""
    samples: Annotated[int, ">= 1"] = 8192
    """Training samples; there are no others."""


class Pixels:
    """The training split, as tensors: images [N, C, H, W] uint8 and labels [N] int64."""

    def __init__(self, config: Config, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        shape = (config.samples, config.channels, config.size, config.size)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
        self.labels = torch.randint(0, NUM_CLASSES, (config.samples,), generator=draw)
        self.scale = torch.full((config.channels, 1, 1), 1 / (255 * STD))
        self.shift = torch.full((config.channels, 1, 1), -MEAN / STD)

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """What the peers call: one batch by its indices [B]."""
        turns.tick()
        return self.images[index], self.labels[index]

    def normalise(self, images: Tensor) -> Tensor:
        """(x / 255 - mean) / std per channel, for the peers; as `recipes.image_classification` does it."""
        return torch.addcmul(self.shift, images.float(), self.scale)

    def batch(self, indices: Sequence[int], epoch: int) -> Batch:
        """What `trainer fit` calls."""
        images, labels = self.gather(torch.from_numpy(np.asarray(indices)))
        return {"image": images, "label": labels, "bad": []}


def build(config: Config, seed: int) -> ImageSplits:
    info = ImageInfo(
        class_names=tuple(map(str, range(NUM_CLASSES))),
        class_counts=(config.samples // NUM_CLASSES,) * NUM_CLASSES,
        channels=config.channels,
        height=config.size,
        width=config.size,
        mean=(MEAN,) * config.channels,
        std=(STD,) * config.channels,
    )
    return ImageSplits(info, f"random pictures {config} {seed}", {"train": Pixels(config, seed)})

"""The contenders of `data_loading.py`: pictures from a folder, as normalised float batches in the training process."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from workloads import turns

SIZE, RESIZE = 224, 256
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ENDLESS = 10**9
"""Samples: the benchmark ends a contender, never the contender itself."""


@dataclass(frozen=True)
class Work:
    """What is read: `folder/train` and `folder/val`, with the transforms of `split`."""

    folder: str
    split: str
    batch_size: int
    workers: int


def start(contender: Callable[[Work], None], work: Work, connection: Connection, log: Path) -> None:
    """Run a contender in this process, its output going to `log`, measured through `connection`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(file, stream)
    turns.begin(connection)
    contender(work)


class _Nothing(nn.Module):
    """A model that costs nothing: the task normalises its pictures all the same."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_classes))

    def build(self, info: Any) -> nn.Module:
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), -1)


def ours(work: Work) -> None:
    """Data, loader and task of `trainer fit`."""
    from recipes import image_classification
    from recipes.data import image_folder
    from trainer.config import Loading
    from trainer.loading import load
    from trainer.sampling import Plan

    config = image_folder.Config(
        path=work.folder,
        augment=[{"RandomResizedCrop": {"size": [SIZE, SIZE]}}, "HorizontalFlip"],
        transform=[{"SmallestMaxSize": {"max_size": RESIZE}}, {"CenterCrop": {"height": SIZE, "width": SIZE}}],
    )
    data = image_folder.build(config, seed=0)
    task = image_classification.build(image_classification.Config(), _Nothing(data.info.num_classes), data)
    dataset = data.split(work.split)
    assert dataset is not None
    plan = Plan(len(dataset), work.batch_size, drop_last=True)
    loading = Loading(batch_size=work.batch_size, workers=work.workers)
    for loaded in load(dataset, plan.training(0, rank=0), loading, torch.device("cpu")):
        task.loss(task.model, loaded.batch)
        turns.tick()


def torchvision_v1(work: Work) -> None:
    """ImageFolder, the transforms of torchvision's tutorials, and the plain DataLoader."""
    from torchvision import transforms

    crop = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()]
    centre = [transforms.Resize(RESIZE), transforms.CenterCrop(SIZE)]
    steps = [*(crop if work.split == "train" else centre), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    _read(work, transforms.Compose(steps))


def torchvision_v2(work: Work) -> None:
    """The same with torchvision's newer transforms."""
    from torchvision.transforms import v2

    crop = [v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip()]
    centre = [v2.Resize(RESIZE), v2.CenterCrop(SIZE)]
    steps = [v2.ToImage(), *(crop if work.split == "train" else centre)]
    _read(work, v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]))


def _read(work: Work, transform: Callable[[Any], Tensor]) -> None:
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(Path(work.folder, work.split)), transform)
    order = RandomSampler(dataset, replacement=True, num_samples=ENDLESS)
    for _ in DataLoader(dataset, work.batch_size, sampler=order, num_workers=work.workers):
        turns.tick()

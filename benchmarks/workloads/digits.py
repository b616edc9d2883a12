"""The quickstart's work as a script of one's own would have it: scikit-learn's loader, torch's modules."""

from __future__ import annotations

import math

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.utils.data import TensorDataset

BATCH_SIZE, EPOCHS, LEARNING_RATE, WEIGHT_DECAY, WARMUP = 64, 30, 3e-3, 0.05, 40


def train_set() -> TensorDataset:
    """Images [N, 1, 8, 8], normalised, and labels [N]."""
    images, labels = load_digits(return_X_y=True)
    images, _, labels, _ = train_test_split(images, labels, test_size=0.3, stratify=labels, random_state=0)
    pixels = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return TensorDataset((pixels - 0.305) / 0.376, torch.tensor(labels))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.norm1(x))
        return self.shortcut(x) + self.conv2(relu(self.norm2(self.conv1(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(Block(32, 32, 1), Block(32, 64, 2), Block(64, 128, 2))
        self.norm = nn.GroupNorm(8, 128)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(relu(self.norm(self.blocks(self.stem(x)))).mean((2, 3)))


def optimizer_and_schedule(
    model: nn.Module, total_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW; cosine after a linear warm-up."""

    def factor(step: int) -> float:
        if step < WARMUP:
            return (step + 1) / WARMUP
        return (1 + math.cos(math.pi * (step - WARMUP) / max(1, total_steps - WARMUP))) / 2

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

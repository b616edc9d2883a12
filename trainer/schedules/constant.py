"""The base learning rate throughout, after warm-up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from trainer.optim import warmup


@dataclass(frozen=True)
class Config:
    warmup_steps: Annotated[int, ">= 0"] = 0
    """Optimizer steps of linear warm-up."""


def build(config: Config, total_steps: int) -> Callable[[int], float]:
    return lambda step: warmup(step, config.warmup_steps)

"""Half a cosine from the base learning rate down to `final`, after warm-up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from trainer.optim import progress_after_warmup, warmup


@dataclass(frozen=True)
class Config:
    warmup_steps: Annotated[int, ">= 0"] = 0
    """Optimizer steps of linear warm-up."""
    final: Annotated[float, ">= 0", "<= 1"] = 0.0
    """Share of the base learning rate at the last step."""


def build(config: Config, total_steps: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        done = progress_after_warmup(step, config.warmup_steps, total_steps)
        return warmup(step, config.warmup_steps) * (
            config.final + (1 - config.final) * (1 + math.cos(math.pi * done)) / 2
        )

    return factor

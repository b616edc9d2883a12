"""Warm-up, stable, decay (Hu et al. 2024): the base rate for most of the run, then a straight line down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from trainer.optim import warmup


@dataclass(frozen=True)
class Config:
    warmup_steps: Annotated[int, ">= 0"] = 0
    """Optimizer steps of linear warm-up."""
    decay_share: Annotated[float, "> 0", "<= 1"] = 0.1
    """Share of all steps, at the end, in which the rate falls."""
    final: Annotated[float, ">= 0", "<= 1"] = 0.0
    """Share of the base learning rate at the last step."""


def build(config: Config, total_steps: int) -> Callable[[int], float]:
    decay_steps = max(1, round(config.decay_share * total_steps))

    def factor(step: int) -> float:
        done = min(1.0, max(0.0, (step + 1 - (total_steps - decay_steps)) / decay_steps))
        return warmup(step, config.warmup_steps) * (1 + (config.final - 1) * done)

    return factor

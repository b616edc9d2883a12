"""Every trial is trained to its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler

    from trainer.search.pacing import Rhythm


@dataclass(frozen=True)
class Config:
    pass


def build(config: Config, rhythm: Rhythm) -> TrialScheduler:
    from ray.tune.schedulers import FIFOScheduler

    return FIFOScheduler()

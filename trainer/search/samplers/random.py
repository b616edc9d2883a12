"""Random search: every trial apart from the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

    from trainer.search.study import Setting


@dataclass(frozen=True)
class Config:
    pass


def build(config: Config, setting: Setting) -> BaseSampler:
    from optuna.samplers import RandomSampler

    return RandomSampler(seed=setting.trial_seed)

"""`single` for one process, `ddp` for several: the same YAML on a laptop and under torchrun."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.strategies import ddp, single
from trainer.world import World


@dataclass(frozen=True)
class Config:
    pass


def build(config: Config, world: World) -> Any:
    if world.size > 1:
        return ddp.build(ddp.Config(), world)
    return single.build(single.Config(), world)

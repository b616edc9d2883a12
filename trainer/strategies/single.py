"""One process, one device."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.errors import UserError
from trainer.world import World


@dataclass(frozen=True)
class Config:
    pass


def build(config: Config, world: World) -> str:
    if world.size > 1:
        raise UserError(f"strategy: single runs one process, but {world.size} were started; use auto, ddp or fsdp")
    return "auto"

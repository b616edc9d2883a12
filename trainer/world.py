"""Which process of how many this is, read from the environment that torchrun sets. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.errors import UserError


@dataclass(frozen=True)
class World:
    """Place of this process in the job; one process where nothing launched several."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launched: bool = False
    """Whether a launcher made this world; torchrun may make one of a single process, too."""

    @property
    def num_nodes(self) -> int:
        return self.size // self.local_size

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def from_environment(env: Mapping[str, str] = os.environ) -> World:
    """The world of `RANK`, `WORLD_SIZE`, `LOCAL_RANK` and `LOCAL_WORLD_SIZE`; a UserError where they contradict."""
    if "WORLD_SIZE" not in env:
        return World()
    missing = [
        key for key in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if key not in env
    ]
    if missing:
        raise UserError(f"WORLD_SIZE is set but {', '.join(missing)} is not: start the processes with torchrun")
    try:
        rank, size, local_rank, local_size = (
            int(env[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        )
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE must be whole numbers: {error}") from None
    world = World(rank, size, local_rank, local_size, launched=True)
    if not (0 <= world.rank < world.size and 0 <= world.local_rank < world.local_size <= world.size):
        raise UserError(f"the environment describes no world: {world}")
    if world.size % world.local_size:
        raise UserError(
            f"{world.size} processes are not a multiple of {world.local_size} per node: "
            "start the same number on each node"
        )
    return world

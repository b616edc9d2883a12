"""Fully sharded data parallel (FSDP2): each process holds a part of weights, gradients and optimizer state."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

from trainer.strategies.ddp import require_world
from trainer.world import World

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Config:
    reshard_after_forward: bool = True
    """Free a block's gathered weights between forward and backward: less memory, more exchange."""
    timeout_minutes: Annotated[float, "> 0"] = 30.0
    """How long a rank waits for the others before it gives up."""


def build(config: Config, world: World) -> Any:
    from lightning.fabric.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    from trainer.blocks import find_blocks

    require_world("fsdp", world)

    def shard(model: nn.Module, mesh: Any) -> nn.Module:
        """Shard each block by itself, so that only one is whole at a time, then what is left."""
        mesh = mesh["data_parallel"]
        for block in find_blocks(model).values():
            fully_shard(block, mesh=mesh, reshard_after_forward=config.reshard_after_forward)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        return model

    return ModelParallelStrategy(
        parallelize_fn=shard,
        data_parallel_size=world.size,
        tensor_parallel_size=1,
        timeout=timedelta(minutes=config.timeout_minutes),
    )

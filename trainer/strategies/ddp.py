"""Distributed data parallel: every process holds the whole model, gradients are averaged."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any

from trainer.errors import UserError
from trainer.world import World


@dataclass(frozen=True)
class Config:
    find_unused_parameters: bool = False
    """Allow parameters that take no part in a step; costs a walk over the graph each step."""
    bucket_mb: Annotated[int, ">= 1"] = 25
    """Size of the buckets in which gradients are exchanged, in MiB."""
    timeout_minutes: Annotated[float, "> 0"] = 30.0
    """How long a rank waits for the others before it gives up."""


def require_world(name: str, world: World) -> None:
    """A UserError where no launcher made a world; one of a single process is what is left of an elastic job."""
    if not world.launched:
        raise UserError(
            f"strategy: {name} needs several processes, but there is one: start them with "
            "`torchrun --nproc-per-node=2 -m trainer fit ...`, or set strategy=auto"
        )


def build(config: Config, world: World) -> Any:
    from lightning.fabric.strategies import DDPStrategy

    require_world("ddp", world)
    return DDPStrategy(
        timeout=timedelta(minutes=config.timeout_minutes),
        find_unused_parameters=config.find_unused_parameters,
        bucket_cap_mb=config.bucket_mb,
        gradient_as_bucket_view=True,
    )

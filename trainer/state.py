"""What a job must remember to go on with the same bits: gathered from the engine, and put back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from trainer import random_state
from trainer.ema import WeightAverage
from trainer.engine import Engine
from trainer.errors import TrainerError, UserError

Tensors = dict[str, torch.Tensor]


@dataclass
class Progress:
    """Where a job is."""

    step: int = 0
    """Optimizer steps done."""
    consumed: int = 0
    """Samples used, over all epochs and ranks."""
    best: float | None = None
    """Best value of `checkpoint.monitor` so far."""


@dataclass
class JobState:
    """Everything of one job, cut the way a checkpoint is: tensors by group, numbers beside them."""

    model: Tensors
    optimizer: Tensors
    """`<parameter>/<key>`, e.g. `blocks.0.weight/exp_avg`."""
    ema: Tensors
    random: Tensors
    """`rank<r>/<kind>` for all ranks; needed on rank 0 only."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """JSON: progress, loss scale, optimizer state that is no tensor."""


def capture(engine: Engine, ema: WeightAverage | None, progress: Progress) -> JobState:
    """The job's state as references to live tensors; all ranks call it. Copy them before the next step."""
    engine.share_buffers(ema.tensors if ema else {})  # what is written must be what every rank goes on with
    optimizer: Tensors = {}
    optimizer_numbers: dict[str, float] = {}
    for name, state in _optimizer_states(engine):
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                optimizer[f"{name}/{key}"] = value
            else:
                optimizer_numbers[f"{name}/{key}"] = value
    every_rank = engine.gather(random_state.capture(engine.device))
    return JobState(
        model={name: tensor.detach() for name, tensor in engine.kept().items()},
        optimizer=optimizer,
        ema=dict(ema.tensors) if ema else {},
        random={f"rank{rank}/{kind}": t for rank, states in enumerate(every_rank) for kind, t in states.items()},
        numbers={
            "progress": progress.__dict__.copy(),
            "optimizer": optimizer_numbers,
            "scaler": engine.precision.state_dict(),
            "base": engine.base,
        },
    )


def restore(engine: Engine, ema: WeightAverage | None, state: JobState, seed: int) -> Progress:
    """Put a loaded state into the engine; all ranks call it. Tensors may be whole or already sharded."""
    load_weights(engine, ema, state)
    values: dict[str, Any] = {**state.optimizer, **state.numbers["optimizer"]}
    for name, live in _optimizer_states(engine):
        mine = {key.rsplit("/", 1)[1]: value for key, value in values.items() if key.rsplit("/", 1)[0] == name}
        parameter = engine.parameter(name)
        if parameter is None:
            raise TrainerError(f"the model's state_dict lacks its parameter {name}: the run can't go on exactly")
        written = state.model[name].dtype
        live.clear()  # a rollback finds the state of later steps here
        live.update({key: _place(value, key, parameter, written, engine) for key, value in mine.items()})
    if state.numbers["scaler"]:
        engine.precision.load_state_dict(state.numbers["scaler"])
    progress = Progress(**state.numbers["progress"])
    prefix = f"rank{engine.world.rank}/"
    own = {key.removeprefix(prefix): tensor for key, tensor in state.random.items() if key.startswith(prefix)}
    if own and state.numbers["world_size"] == engine.world.size:
        random_state.restore(own, engine.device)
    else:  # another number of ranks: no rank can go on with its own state
        random_state.seed_everything(random_state.rank_seed(seed, engine.world.rank, progress.step))
    return progress


def load_weights(engine: Engine, ema: WeightAverage | None, state: JobState) -> None:
    """Copy whole or sharded tensors into the model's parameters and buffers, and the averages, name by name.

    Averages are the weights where the state has none. Raises UserError for a checkpoint that lacks the frozen weights
    of another base than the model has.
    """
    require_base(engine.base, state)
    for name, tensor in engine.kept().items():
        _copy_into(tensor.detach(), state.model[name])
    for name, tensor in ema.tensors.items() if ema is not None else ():
        _copy_into(tensor, (state.ema or state.model)[name])


def require_base(base: str | None, state: JobState) -> None:
    """UserError where a checkpoint was made beside other frozen weights than those of fingerprint `base`."""
    theirs = state.numbers.get("base")
    if theirs != base:
        raise UserError(
            f"init_from: the checkpoint was trained beside other frozen weights (fingerprint {str(theirs)[:12]}) than "
            f"those that are there now ({str(base)[:12]}): put the former back, or start a new run"
        )


def whole(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Copies on the CPU, put together where they are sharded; all ranks call it with the same names."""
    return {name: _full(tensor.detach()).to("cpu", copy=True) for name, tensor in tensors.items()}


def _full(tensor: Any) -> torch.Tensor:
    full: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.to_dense() if full.is_sparse else full


def _optimizer_states(engine: Engine) -> list[tuple[str, dict[str, Any]]]:
    names = {id(parameter): name for name, parameter in engine.bare.named_parameters()}
    return [
        (names[id(parameter)], optimizer.state[parameter])
        for optimizer in engine.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


def _place(value: Any, key: str, parameter: torch.Tensor, written: torch.dtype, engine: Engine) -> Any:
    """One value of an optimizer's state for `parameter`, which was of type `written` when it was saved."""
    if not isinstance(value, torch.Tensor) or (key == "step" and not engine.fused):
        return value
    if value.dtype == written:  # train.precision may have changed
        value = value.to(parameter.dtype)
    if value.shape != parameter.shape or hasattr(value, "device_mesh"):
        return value.to(engine.device)
    if hasattr(parameter, "device_mesh"):
        return _distribute(value, parameter)
    # Fused kernels walk through memory: the state must lie there in the weight's own order, e.g. channels_last.
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def _distribute(whole: torch.Tensor, like: Any) -> torch.Tensor:
    from torch.distributed.tensor import distribute_tensor

    # Every rank has read the whole tensor itself, so none has to be sent.
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def _copy_into(target: torch.Tensor, source: torch.Tensor) -> None:
    if hasattr(target, "device_mesh") and not hasattr(source, "device_mesh"):
        source = _distribute(source, target)
    target.copy_(source)

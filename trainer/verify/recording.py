"""Listens to one step of a training: batches, outputs of all modules, loss and gradients, for comparison with another.

A module's output is kept as two numbers a sample, its inner product with a fixed random vector and its norm, both in
float64. Outputs that differ have other products, but for a chance that is nil, and products can be put together over
ranks and micro-batches, sample by sample, however the global batch was cut.
"""

from __future__ import annotations

import hashlib
import json
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from trainer import random_state
from trainer.blocks import find_blocks
from trainer.loop import Job
from trainer.sampling import MicroBatch
from trainer.state import whole
from trainer.task import Batch
from trainer.tensor_file import write_tensors
from trainer.verify import Order

ROWS_BYTES = 64 << 20
"""Memory for the float64 copies from which the numbers of samples are made."""
LOSS_SCALE = 256.0
DROP_PATHS = ("DropPath", "StochasticDepth")
"""Classes of timm and torchvision that leave out whole branches."""


class Recorder:
    """On one rank. Writes `rank-<r>.json` and `rank-<r>.safetensors`, and rank 0 the weights before the step
    (`before.safetensors`) and the gradients right before the optimizer (`gradients-<step>.safetensors`), across worlds
    those of the steps after it, too."""

    def __init__(self, job: Job, order: Order) -> None:
        self._job, self._order, self._folder = job, order, Path(order.out)
        self._step = -1
        self._done = False
        self._listens = False
        self._num_samples = 0
        self._silenced: Counter[str] = Counter()
        self._names = _heard_modules(job)

    def attach(self) -> None:
        """Take the place of the task's loss and of the engine's step, and listen to the model."""
        job, order = self._job, self._order
        if order.global_batch is not None:
            job.plan = replace(job.plan, kept_global_batch=order.global_batch)
        if order.across_worlds:
            job.val_set = None
            self._silenced = silence(job.engine.bare)
            _lower_loss_scale(job)
        self._hooks = [job.engine.bare.register_forward_pre_hook(self._hear_input, with_kwargs=True)]
        for name, module in self._names.items():
            self._hooks.append(module.register_forward_hook(self._hearing(name)))
        loss, step = job.task.loss, job.engine.step

        def heard_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
            if self._done or job.progress.step + 1 < order.step:
                return loss(model, batch)
            self._begin_micro_batch(batch)
            try:
                part, count = loss(model, batch)
            finally:
                self._listens = False
            if self._num_samples:
                self._losses.append((float(part.detach()), float(count)))
            return part, count

        def heard_step() -> None:
            if job.progress.step + 1 >= order.step:
                self._end_step()
            step()

        setattr(job.task, "loss", heard_loss)  # noqa: B010  # on the instance: the loop calls exactly these
        setattr(job.engine, "step", heard_step)  # noqa: B010

    # -- what is heard --------------------------------------------------------------------------------------------

    def _begin_step(self) -> None:
        job = self._job
        self._step = job.progress.step
        self._micros: Iterator[MicroBatch] = job.plan.training(
            job.progress.consumed, job.engine.world.rank, job.guard.left_out
        )
        self._indices: list[int] = []
        self._losses: list[tuple[float, float]] = []
        self._summaries: dict[str, list[Tensor]] = {}
        self._order_of_calls: dict[str, None] = {}
        self._num_micros = 0
        self._random = {
            kind: hashlib.sha256(state.numpy().tobytes()).hexdigest()
            for kind, state in random_state.capture(job.engine.device).items()
        }
        self._before = whole(job.engine.kept())
        if self._order.stops:
            signal.raise_signal(signal.SIGTERM)  # a wish to stop, which the loop fulfils after this step

    def _begin_micro_batch(self, batch: Batch) -> None:
        if self._step != self._job.progress.step:
            self._begin_step()
        micro = next(self._micros)
        bad = {index for index, _ in batch["bad"]}
        indices = [] if micro.filler else [index for index in micro.indices if index not in bad]
        self._num_samples = len(indices)
        self._calls: Counter[str] = Counter()
        if not indices:  # a filler, of which nothing counts
            return
        self._indices += indices
        self._num_micros += 1
        self._listens = True
        for name, value in batch.items():
            if isinstance(value, Tensor):
                self._keep(f"batch/{name}", value)

    def _hear_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._listens:
            self._calls["input"] += 1
            self._keep(_numbered("input/", self._calls["input"]), [*args, *kwargs.values()])

    def _hearing(self, name: str) -> Any:
        def hear(module: nn.Module, args: Any, output: Any) -> None:
            if self._listens:
                self._calls[name] += 1
                key = _numbered(f"module/{name}", self._calls[name])
                self._order_of_calls.setdefault(key)
                self._keep(key, output)

        return hear

    def _keep(self, key: str, value: Any) -> None:
        for suffix, tensor in _tensors(value):
            if tensor.shape[:1] == (self._num_samples,) and tensor.numel():
                self._summaries.setdefault(f"{key}{suffix}", []).append(summary(tensor))

    # -- the end of the step --------------------------------------------------------------------------------------

    def _end_step(self) -> None:
        engine, step = self._job.engine, self._job.progress.step + 1
        if self._done and not self._order.across_worlds:
            return
        gradients = whole({name: p.grad for name, p in engine.bare.named_parameters() if p.grad is not None})
        if not self._done:
            finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())
            if engine.scales_loss and not finite and not self._order.stops:
                return  # the loss scaler is looking for its scale, and leaves this step out
            self._done = True
            for hook in self._hooks:
                hook.remove()
            self._write()
            self._before, self._summaries = {}, {}  # nothing of it is needed any more, and the training goes on
        if engine.world.is_main:
            write_tensors(self._folder / f"gradients-{step}.safetensors", gradients)

    def _write(self) -> None:
        rank = self._job.engine.world.rank
        everywhere = {key: parts for key, parts in self._summaries.items() if len(parts) == self._num_micros}
        tables = {key: torch.cat(parts) for key, parts in everywhere.items()}
        write_tensors(
            self._folder / f"rank-{rank}.safetensors",
            {"indices": torch.tensor(self._indices, dtype=torch.int64), **tables},
        )
        heard = {
            "step": self._step + 1,
            "calls": list(self._order_of_calls),
            "kinds": {name: type(module).__name__ for name, module in self._job.engine.bare.named_modules()},
            "losses": self._losses,
            "random": self._random,
            "silenced": self._silenced,
        }
        (self._folder / f"rank-{rank}.json").write_text(json.dumps(heard))
        if rank == 0:
            write_tensors(self._folder / "before.safetensors", self._before)


def silence(model: nn.Module) -> Counter[str]:
    """Switch off what each rank draws for itself in a forward pass; returns how many modules of which class."""
    found: Counter[str] = Counter()
    for module in model.modules():
        kind = type(module).__name__
        if isinstance(module, _DropoutNd) or kind in DROP_PATHS:
            name = "p" if hasattr(module, "p") else "drop_prob"
        elif isinstance(module, nn.MultiheadAttention):
            name = "dropout"
        else:
            continue
        if getattr(module, name):
            setattr(module, name, 0.0)
            found[kind] += 1
    return found


def _lower_loss_scale(job: Job) -> None:
    """Let no scaled gradient overflow: the micro-batches of one world have larger ones than those of another."""
    state = job.engine.precision.state_dict()
    if "scale" in state:
        job.engine.precision.load_state_dict({**state, "scale": min(state["scale"], LOSS_SCALE)})


@torch.no_grad()
def summary(tensor: Tensor) -> Tensor:
    """[N, ...] to [N, 2]: each sample's inner product with a fixed random vector, and its norm; float64."""
    rows = tensor.detach().reshape(len(tensor), -1)
    direction = _direction(rows.shape[1])
    at_once = max(1, ROWS_BYTES // (8 * rows.shape[1]))
    parts = []
    for start in range(0, len(rows), at_once):
        part = rows[start : start + at_once].cpu().to(torch.float64)
        parts.append(torch.stack([part @ direction, part.norm(dim=1)], dim=1))
    return torch.cat(parts)


@lru_cache(maxsize=64)
def _direction(size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _tensors(value: Any) -> list[tuple[str, Tensor]]:
    """The real tensors in a module's output, with where they stand in it; nested ones are left aside."""
    if isinstance(value, Tensor):
        found = [("", value)]
    elif isinstance(value, list | tuple):
        found = [(f"[{place}]", item) for place, item in enumerate(value)]
    elif isinstance(value, Mapping):
        found = [(f"[{name}]", item) for name, item in value.items()]
    else:
        found = []
    return [(place, item) for place, item in found if isinstance(item, Tensor) and not item.is_complex()]


def _numbered(name: str, call: int) -> str:
    return name if call == 1 else f"{name}#{call}"


def _heard_modules(job: Job) -> dict[str, nn.Module]:
    """Modules by name, but not what is compiled into one piece with others: a hook in it would break it up."""
    model = job.engine.bare
    blocks = list(find_blocks(model)) or [""] if job.config.train.compile else []
    inside = tuple(f"{block}." if block else "" for block in blocks)
    return {
        name: module
        for name, module in model.named_modules()
        if not (inside and name and name.startswith(inside)) and type(module).forward is not nn.Module.forward
    }

"""Lightning's Trainer with ModelCheckpoint: as it is, and with AsyncCheckpointIO, which writes in a thread."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor, nn

from workloads.saves import BATCH, WIDTH, Clock, build, optimizer, sync

ENDLESS = 10**9


class Batches:
    """One batch, again and again."""

    def __iter__(self) -> Iterator[Tensor]:
        return itertools.repeat(torch.randn(BATCH, WIDTH))


class Module(lightning.LightningModule):
    def __init__(self, model: nn.Module, clock: Clock) -> None:
        super().__init__()
        self.model, self.clock = model, clock

    def on_train_start(self) -> None:
        self.clock.first_step()

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.clock.tick()
        return self.model(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer(self.model)


class Timed(ModelCheckpoint):
    """Saves when the clock wants it, and tells it how long that took; it keeps one, as it does by default."""

    def __init__(self, folder: Path, clock: Clock, io: AsyncCheckpointIO | None) -> None:
        super().__init__(dirpath=folder, every_n_train_steps=1)
        self._clock, self._io, self._second = clock, io, folder / "second.ckpt"

    def on_train_batch_end(self, *arguments: Any) -> None:
        clock = self._clock
        if not clock.wants_save:
            return
        began = time.perf_counter()
        super().on_train_batch_end(*arguments)
        stall, second = time.perf_counter() - began, 0.0
        if clock.is_twice:
            again = time.perf_counter()
            arguments[0].save_checkpoint(self._second)  # the callback itself saves a step only once
            second = time.perf_counter() - again
        clock.saved(began, stall, second)
        if self._io is None:
            self._make_durable()
        else:
            assert self._io._executor is not None  # one thread: this comes after what it has to write
            self._io._executor.submit(self._make_durable)

    def _make_durable(self) -> None:
        sync(Path(self.best_model_path))
        self._clock.is_durable()


def run(variant: str, megabytes: int, folder: Path, clock: Clock) -> None:
    io = AsyncCheckpointIO() if variant == "async" else None
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=ENDLESS,
        max_epochs=-1,
        logger=False,
        callbacks=[Timed(folder, clock, io)],
        plugins=[io] if io is not None else None,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(build(megabytes), clock), Batches())

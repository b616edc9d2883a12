"""Lightning's Trainer, without checkpoints, progress bar and summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from workloads import turns
from workloads.pixels import Pixels
from workloads.work import ENDLESS, LOG_EVERY, Batches, Work


class Module(lightning.LightningModule):
    def __init__(self, work: Work, model: nn.Module, data: Pixels, logs: bool, ticks: bool) -> None:
        super().__init__()
        self.work, self.model, self.data, self.logs, self.ticks = work, model, data, logs, ticks

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        if self.ticks:
            turns.tick()
        images, labels = batch
        loss = cross_entropy(self.model(self.data.normalise(images)), labels)
        if self.logs:
            self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.work.optimizer(self.model)


def run(work: Work, folder: Path, loader: bool, logs: bool) -> None:
    """
    Args:
        loader: Take the documented DataLoader over a TensorDataset, which collates sample by sample, in place of
            batches by indexing.
        logs: Call `self.log` in each step; a CSV logger writes every `LOG_EVERY`-th to a file. Without it nothing
            is logged.
    """
    model, data = work.build(folder)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=ENDLESS,
        max_epochs=-1,
        logger=CSVLogger(str(folder), name=f"{work.name}-lightning") if logs else False,
        log_every_n_steps=LOG_EVERY,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches: Any = Batches(data, work.batch_size)
    if loader:
        batches = DataLoader(TensorDataset(data.images, data.labels), work.batch_size, shuffle=True)
    trainer.fit(Module(work, model, data, logs, ticks=loader), batches)

"""The contenders of `engine_overhead.py`: the same training, step by step, as each of the libraries writes it.

All take the same pictures by tensor indexing in a permutation per epoch, normalise them in the same way, and use the
same model and fused AdamW; all but Lightning without `self.log` read the loss every `LOG_EVERY` steps.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import accelerate
import lightning
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from trainer import cli
from trainer.load import load
from workloads import pixels, turns
from workloads.pixels import Pixels

LOG_EVERY = 10
ENDLESS = 10**9
"""Steps: the benchmark ends a contender, never the contender itself."""


@dataclass(frozen=True)
class Work:
    """What is trained: sections of a `trainer` config, from which the peers' parts are built, too."""

    name: str
    model: dict[str, Any]
    data: dict[str, Any]
    batch_size: int
    lr: float = 1e-3
    weight_decay: float = 0.01

    def config(self, folder: Path, tracking: bool) -> dict[str, Any]:
        """The config of `trainer fit`. Nothing is evaluated or saved, as with the peers."""
        return {
            "name": self.name,
            "recipe": "image_classification",
            "model": self.model,
            "data": {"name": "workloads.pixels", **self.data, "batch_size": self.batch_size},
            "optimizer": {"name": "adamw", "lr": self.lr, "weight_decay": self.weight_decay},
            "schedule": {"name": "constant"},
            "train": {"max_steps": ENDLESS, "device": "cpu", "log_every": LOG_EVERY},
            "checkpoint": {"every_minutes": None},
            "tracking": {"enabled": tracking},
            "runs_dir": str(folder),
        }

    def parts(self, folder: Path) -> tuple[nn.Module, Pixels]:
        """The same model and data as `trainer fit` builds them."""
        file = folder / f"{self.name}-{os.getpid()}.json"
        file.write_text(json.dumps(self.config(folder, tracking=False)))
        config = load(str(file), [])
        torch.manual_seed(config.seed)
        data = config.data.build(seed=config.seed)
        return config.model.build(info=data.info), cast(Pixels, data.split("train"))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Fused AdamW; norms and biases are not decayed, as in `trainer fit`."""
        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.lr, fused=True)


SCALE = torch.tensor(1 / (255 * pixels.STD))
SHIFT = torch.tensor(-pixels.MEAN / pixels.STD)


def normalise(images: Tensor) -> Tensor:
    """(x / 255 - mean) / std, in the one operation that `recipes.image_classification` uses."""
    return torch.addcmul(SHIFT, images, SCALE)


class Batches:
    """An epoch's batches by tensor indexing, in a new order each time: what a loader in memory comes down to."""

    def __init__(self, data: Pixels, batch_size: int) -> None:
        self.data, self.batch_size = data, batch_size

    def __len__(self) -> int:
        return len(self.data) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randperm(len(self.data)).split(self.batch_size):
            yield self.data.gather(index)


def start(contender: Callable[[], None], connection: Connection, log: Path) -> None:
    """Run a contender in this process, its output going to `log`, measured through `connection`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(file, stream)
    warnings.filterwarnings("ignore", module="lightning")
    turns.begin(connection)
    contender()


def trainer_fit(work: Work, tracking: bool, folder: Path) -> None:
    """`trainer fit --config FILE`, with run directory, `metrics.jsonl` and progress lines."""
    folder = folder / ("tracked" if tracking else "untracked")
    folder.mkdir(exist_ok=True)
    file = folder / f"{work.name}.json"
    file.write_text(json.dumps(work.config(folder, tracking)))
    raise SystemExit(cli.main(["fit", "--config", str(file), "--debug"]))


def hand_written(work: Work, folder: Path) -> None:
    """The loop that everybody writes."""
    model, data = work.parts(folder)
    optimizer = work.optimizer(model)
    model.train()
    step = 0
    while True:
        for images, labels in Batches(data, work.batch_size):
            loss = cross_entropy(model(normalise(images)), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % LOG_EVERY == 0:
                loss.item()


def accelerate_loop(work: Work, folder: Path) -> None:
    """Accelerate's documented loop; the batches are on the device already."""
    model, data = work.parts(folder)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, work.optimizer(model))
    prepared.train()
    step = 0
    while True:
        for images, labels in Batches(data, work.batch_size):
            optimizer.zero_grad()
            loss = cross_entropy(prepared(normalise(images)), labels)
            accelerator.backward(loss)
            optimizer.step()
            step += 1
            if step % LOG_EVERY == 0:
                loss.item()


def fabric_loop(work: Work, folder: Path) -> None:
    """Lightning Fabric's documented loop."""
    model, data = work.parts(folder)
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    prepared, optimizer = fabric.setup(model, work.optimizer(model))
    prepared.train()
    step = 0
    while True:
        for images, labels in Batches(data, work.batch_size):
            optimizer.zero_grad()
            loss = cross_entropy(prepared(normalise(images)), labels)
            fabric.backward(loss)
            optimizer.step()
            step += 1
            if step % LOG_EVERY == 0:
                loss.item()


class Module(lightning.LightningModule):
    """Lightning's form of the work."""

    def __init__(self, work: Work, model: nn.Module, logs: bool, ticks: bool) -> None:
        super().__init__()
        self.work, self.model, self.logs, self.ticks = work, model, logs, ticks

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        if self.ticks:
            turns.tick()
        images, labels = batch
        loss = cross_entropy(self.model(normalise(images)), labels)
        if self.logs:
            self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.work.optimizer(self.model)


def lightning_trainer(work: Work, loader: bool, logs: bool, folder: Path) -> None:
    """Lightning's Trainer without logger, checkpoints and progress bar.

    Args:
        loader: The documented DataLoader over a TensorDataset, which collates sample by sample, in place of indexing.
        logs: Call `self.log` in each step (with a CSV logger, as without one nothing would be written).
    """
    model, data = work.parts(folder)
    fit = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=ENDLESS,
        max_epochs=-1,
        logger=lightning.pytorch.loggers.CSVLogger(str(folder), name=f"{work.name}-lightning") if logs else False,
        log_every_n_steps=LOG_EVERY,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches: Any = Batches(data, work.batch_size)
    if loader:
        batches = DataLoader(TensorDataset(data.images, data.labels), work.batch_size, shuffle=True)
    fit.fit(Module(work, model, logs, ticks=loader), batches)

"""What the contenders of `engine_overhead.py` have in common: model, data, optimizer, and how one is started."""

from __future__ import annotations

import importlib
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workloads import turns

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

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

    def config_file(self, folder: Path, tracking: bool) -> Path:
        """Write the config of `trainer fit` into `folder`. Nothing is evaluated or saved, as with the peers."""
        config = {
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
        folder.mkdir(exist_ok=True)
        file = folder / f"{self.name}-{os.getpid()}.json"
        file.write_text(json.dumps(config))
        return file

    def build(self, folder: Path) -> tuple[nn.Module, Pixels]:
        """The same model and data as `trainer fit` builds."""
        import torch

        from trainer.load import load

        config = load(str(self.config_file(folder, tracking=False)), [])
        torch.manual_seed(config.seed)
        data = config.data.build(seed=config.seed)
        model = config.model.build(info=data.info)
        model.train()
        return model, data.split("train")

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Fused AdamW; norms and biases are not decayed, as in `trainer fit`."""
        import torch

        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.lr, fused=True)


class Batches:
    """An epoch's batches by tensor indexing, in a new order each time: what a loader in memory comes down to."""

    def __init__(self, data: Pixels, batch_size: int) -> None:
        self.data, self.batch_size = data, batch_size

    def __len__(self) -> int:
        return len(self.data) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        import torch

        for index in torch.randperm(len(self.data)).split(self.batch_size):
            yield self.data.gather(index)


def start(contender: str, options: dict[str, Any], work: Work, folder: Path, connection: Connection, log: Path) -> None:
    """Run `workloads.<contender>` in this process, its output going to `log`, measured through `connection`.

    Only the contender's own libraries are imported: `import lightning` sets a variable (for a safe fork on CUDA
    machines) that makes each `optimizer.step()` of the process look for NVIDIA's library, 75 µs a step.
    """
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(file, stream)
    warnings.filterwarnings("ignore", module="lightning")
    turns.begin(connection)
    importlib.import_module(f"workloads.{contender}").run(work, folder, **options)

"""The same with Lightning's Trainer, which has its logger, checkpoints and progress bar on as it comes."""

from __future__ import annotations

import sys
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from workloads.digits import BATCH_SIZE, EPOCHS, Net, optimizer_and_schedule, train_set


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self.net(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        if self.global_step == 1:
            print(f"\nstep 1  loss {outputs['loss']:.4f}", flush=True)

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[dict[str, Any]]]:
        optimizer, schedule = optimizer_and_schedule(self, int(self.trainer.estimated_stepping_batches))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def main(folder: str, logger: Any = None) -> None:
    print("training on the digits", flush=True)
    lightning.seed_everything(0)
    trainer = lightning.Trainer(max_epochs=EPOCHS, log_every_n_steps=10, default_root_dir=folder, logger=logger)
    trainer.fit(Digits(), DataLoader(train_set(), BATCH_SIZE, shuffle=True))


if __name__ == "__main__":
    main(sys.argv[1])

"""Lightning Fabric's documented loop; the batches are where they belong already, so that no loader is set up."""

from __future__ import annotations

from pathlib import Path

from lightning.fabric import Fabric
from torch.nn.functional import cross_entropy

from workloads.work import LOG_EVERY, Batches, Work


def run(work: Work, folder: Path) -> None:
    model, data = work.build(folder)
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    prepared, optimizer = fabric.setup(model, work.optimizer(model))
    step = 0
    while True:
        for images, labels in Batches(data, work.batch_size):
            optimizer.zero_grad()
            loss = cross_entropy(prepared(data.normalise(images)), labels)
            fabric.backward(loss)
            optimizer.step()
            step += 1
            if step % LOG_EVERY == 0:
                loss.item()

"""Accelerate's documented loop; the batches are where they belong already, so that no loader is prepared."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from torch.nn.functional import cross_entropy

from workloads.work import LOG_EVERY, Batches, Work


def run(work: Work, folder: Path) -> None:
    model, data = work.build(folder)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, work.optimizer(model))
    step = 0
    while True:
        for images, labels in Batches(data, work.batch_size):
            optimizer.zero_grad()
            loss = cross_entropy(prepared(data.normalise(images)), labels)
            accelerator.backward(loss)
            optimizer.step()
            step += 1
            if step % LOG_EVERY == 0:
                loss.item()

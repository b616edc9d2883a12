"""The loop that everybody writes."""

from __future__ import annotations

from pathlib import Path

from torch.nn.functional import cross_entropy

from workloads.work import LOG_EVERY, Batches, Work


def run(work: Work, folder: Path) -> None:
    model, data = work.build(folder)
    optimizer = work.optimizer(model)
    step = 0
    while True:
        for images, labels in Batches(data, work.batch_size):
            loss = cross_entropy(model(data.normalise(images)), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % LOG_EVERY == 0:
                loss.item()

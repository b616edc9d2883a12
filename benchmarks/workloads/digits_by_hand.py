"""The hand-written script: imports at the top, as everyone does, then a first line, then the loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from workloads.digits import BATCH_SIZE, EPOCHS, Net, optimizer_and_schedule, train_set


def main(log: Callable[[int, float], None] = lambda step, loss: None) -> None:
    """`log` is given every tenth step and its loss."""
    print("training on the digits", flush=True)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loader = DataLoader(train_set(), BATCH_SIZE, shuffle=True)
    model = Net().to(device)
    optimizer, schedule = optimizer_and_schedule(model, EPOCHS * len(loader))
    step = 0
    for epoch in range(EPOCHS):
        for images, labels in loader:
            loss = cross_entropy(model(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            if step == 1 or step % 10 == 0:
                print(f"step {step}  epoch {epoch}  loss {loss.item():.4f}", flush=True)
                log(step, loss.item())


if __name__ == "__main__":
    main()

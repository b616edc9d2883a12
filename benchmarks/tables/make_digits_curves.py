"""Make `digits_curves.npz`: the learning curves of 864 small networks on scikit-learn's digits, 50 epochs each.

    python benchmarks/tables/make_digits_curves.py [--out FILE]

Multilayer perceptrons with ReLU, at all combinations of GRID, each with two seeds. Half of the 1797 images is trained
on, the other half is the validation set; the two halves are the same for all. The table holds, after each epoch, how
many validation images are told right and their mean cross entropy; and for each combination the seconds of an epoch.

Networks of one shape are trained together, as one batched matrix product; they don't touch each other. The seconds
are those of a network that trains alone: CPU time of one thread, the median of some epochs in rounds far apart, so
that neither the batching nor another program on the machine is in them.

Arrays of the file (`digits_curves` in `workloads/tables.py` reads them):
* `values`: JSON, the grid: name -> values
* `right`: uint16, shape (combinations, seeds, epochs), of `num_validation`; combinations in the order of
  `itertools.product` over the grid
* `loss`: uint16, same shape, in units of 1e-4; what is above 6.5535 or not finite is 6.5535
* `seconds`: float32, shape (combinations,), of an epoch with its evaluation
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional

GRID: dict[str, list[Any]] = {
    "optimizer": ["sgd", "adam"],
    "lr": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1],
    "batch_size": [16, 64, 256],
    "width": [8, 32, 128],
    "depth": [1, 2, 3],
    "dropout": [0.0, 0.3],
}
SEEDS = (0, 1)
EPOCHS = 50
SHAPE = ("optimizer", "batch_size", "width", "depth")
"""Networks that agree in these are trained together."""
TIMING_ROUNDS = 5
LOSS_UNIT = 1e-4


class Data(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor
    x_val: torch.Tensor
    y_val: torch.Tensor


class Curves(NamedTuple):
    """Shapes (networks, epochs)."""

    right: torch.Tensor
    loss: torch.Tensor
    seconds: list[float]
    """CPU time of each epoch, of all the networks together."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("digits_curves.npz"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = read_digits()
    networks = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    right = np.zeros((len(networks), len(SEEDS), EPOCHS), np.uint16)
    loss = np.zeros_like(right)
    for done, numbers in enumerate(groups(networks)):
        members = [(number, seed) for number in numbers for seed in range(len(SEEDS))]
        curves = train([networks[number] for number, _ in members], [SEEDS[seed] for _, seed in members], data, EPOCHS)
        where = tuple(np.array(members).T)
        right[where] = curves.right.numpy()
        loss[where] = np.nan_to_num(curves.loss.numpy() / LOSS_UNIT, nan=np.inf).clip(0, 65535).round()
        print(
            f"{done + 1} groups of {len(networks) // len(numbers)}, the best {right[where].max() / len(data.y_val):.4f}"
        )
    np.savez_compressed(
        arguments.out,
        values=np.array(json.dumps(GRID)),
        right=right,
        loss=loss,
        seconds=np.array(measure(networks, data), np.float32),
        num_validation=np.array(len(data.y_val)),
    )
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e3:.0f} kB")


def read_digits() -> Data:
    images, labels = load_digits(return_X_y=True)
    x, x_val, y, y_val = train_test_split(images / 16, labels, test_size=0.5, random_state=0, stratify=labels)
    real = torch.float32
    return Data(torch.tensor(x, dtype=real), torch.tensor(y), torch.tensor(x_val, dtype=real), torch.tensor(y_val))


def groups(networks: Sequence[dict[str, Any]]) -> Iterator[list[int]]:
    """Numbers of the networks of one shape."""

    def shape(number: int) -> tuple[Any, ...]:
        return tuple(networks[number][key] for key in SHAPE)

    for _, members in itertools.groupby(sorted(range(len(networks)), key=shape), key=shape):
        yield list(members)


def measure(networks: Sequence[dict[str, Any]], data: Data) -> list[float]:
    """Seconds of an epoch of each network alone; a round goes over all, so that a slow minute hits each only once."""
    samples: list[list[float]] = [[] for _ in networks]
    for _ in range(TIMING_ROUNDS):
        for network, taken in zip(networks, samples, strict=True):
            taken += train([network], [0], data, epochs=2).seconds
    return [statistics.median(taken) for taken in samples]


def train(networks: Sequence[dict[str, Any]], seeds: Sequence[int], data: Data, epochs: int) -> Curves:
    """The curves of networks of one shape, each with its seed."""
    first = networks[0]
    torch.manual_seed(seeds[0])
    orders = {seed: np.random.default_rng(seed) for seed in seeds}
    parameters = initial(networks, seeds)
    lr = torch.tensor([network["lr"] for network in networks])[:, None, None]
    dropout = torch.tensor([network["dropout"] for network in networks])[:, None, None]
    update = {"sgd": Sgd, "adam": Adam}[first["optimizer"]](parameters, lr)
    right, losses, seconds = [], [], []
    for _ in range(epochs):
        began = time.thread_time()
        order = {seed: rng.permutation(len(data.y)) for seed, rng in orders.items()}
        rows = torch.from_numpy(np.stack([order[seed] for seed in seeds]))
        for batch in rows.split(first["batch_size"], dim=1):
            logits = forward(parameters, data.x[batch], dropout)
            loss = functional.cross_entropy(logits.flatten(0, 1), data.y[batch].flatten(), reduction="sum")
            update(torch.autograd.grad(loss / batch.shape[1], parameters))
        with torch.no_grad():
            logits = forward(parameters, data.x_val.expand(len(networks), -1, -1), None)
            targets = data.y_val.expand(len(networks), -1)
            right.append((logits.argmax(-1) == targets).sum(1))
            losses.append(functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1))
        seconds.append(time.thread_time() - began)
    return Curves(torch.stack(right, 1), torch.stack(losses, 1), seconds)


def initial(networks: Sequence[dict[str, Any]], seeds: Sequence[int]) -> list[torch.Tensor]:
    """Weights (networks, in, out) and biases (networks, 1, out) of all layers, as `torch.nn.Linear` draws them."""
    sizes = [64, *[networks[0]["width"]] * networks[0]["depth"], 10]
    shapes = [(rows, outputs, inputs**-0.5) for inputs, outputs in itertools.pairwise(sizes) for rows in (inputs, 1)]
    # Each seed's own numbers, the same in whichever company the network is trained.
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [
        torch.stack(
            [torch.empty(rows, outputs).uniform_(-bound, bound, generator=own) for own in generators]
        ).requires_grad_()
        for rows, outputs, bound in shapes
    ]


def forward(parameters: Sequence[torch.Tensor], x: torch.Tensor, dropout: torch.Tensor | None) -> torch.Tensor:
    """Logits, shape (networks, batch, 10), of inputs (networks, batch, 64); no dropout: None, or all rates 0."""
    drops = dropout is not None and bool(dropout.any())
    for weight, bias in zip(parameters[:-2:2], parameters[1:-2:2], strict=True):
        x = torch.relu(torch.baddbmm(bias, x, weight))
        if drops:
            x = x * (torch.rand_like(x) >= dropout) / (1 - dropout)
    return torch.baddbmm(parameters[-1], x, parameters[-2])


class Sgd:
    """With momentum 0.9. `lr` has the shape (networks, 1, 1)."""

    def __init__(self, parameters: Sequence[torch.Tensor], lr: torch.Tensor) -> None:
        self.parameters, self.lr = parameters, lr
        self.momenta = [torch.zeros_like(parameter) for parameter in parameters]

    @torch.no_grad()
    def __call__(self, gradients: Sequence[torch.Tensor]) -> None:
        for parameter, gradient, momentum in zip(self.parameters, gradients, self.momenta, strict=True):
            momentum.mul_(0.9).add_(gradient)
            parameter.sub_(self.lr * momentum)


class Adam:
    """With betas 0.9 and 0.999. `lr` has the shape (networks, 1, 1)."""

    def __init__(self, parameters: Sequence[torch.Tensor], lr: torch.Tensor) -> None:
        self.parameters, self.lr, self.steps = parameters, lr, 0
        self.first = [torch.zeros_like(parameter) for parameter in parameters]
        self.second = [torch.zeros_like(parameter) for parameter in parameters]

    @torch.no_grad()
    def __call__(self, gradients: Sequence[torch.Tensor]) -> None:
        self.steps += 1
        rate = self.lr * (1 - 0.999**self.steps) ** 0.5 / (1 - 0.9**self.steps)
        for parameter, gradient, first, second in zip(self.parameters, gradients, self.first, self.second, strict=True):
            first.lerp_(gradient, 0.1)
            second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            parameter.sub_(rate * first / second.sqrt().add_(1e-8))


if __name__ == "__main__":
    main()

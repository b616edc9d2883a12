"""The order of the data: a function of (seed, epoch), cut into global batches by one number.

The state is `consumed`: how many samples the job has used, where every epoch counts as the whole data set.
Each rank takes its slice of the global batch, so another number of ranks goes on with the same samples. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@lru_cache(maxsize=2)  # the loader runs ahead into the next epoch
def epoch_order(num_samples: int, seed: int, epoch: int) -> Indices:
    """The order of epoch `epoch`: a permutation of `range(num_samples)`, the same on every rank."""
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_samples)
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class MicroBatch:
    """What one rank loads for one forward pass."""

    epoch: int
    indices: tuple[int, ...]
    filler: bool
    """The rank has no sample of its own here: `indices` holds one that takes part with weight zero."""
    last: bool
    """The last micro-batch of its optimizer step."""
    consumed: int
    """Samples consumed by the job once the optimizer step of this micro-batch is done."""


def split(chunk: Indices, batch_size: int, world_size: int, rank: int) -> list[tuple[tuple[int, ...], bool]]:
    """Cut a global batch into micro-batches of at most `batch_size × world_size` and take the slice of `rank`.

    Ranks differ by at most one sample, the lower ones having more. Returns (indices, filler) for each micro-batch;
    every rank gets the same number of them.
    """
    parts = []
    for start in range(0, len(chunk), batch_size * world_size):
        part = chunk[start : start + batch_size * world_size]
        base, extra = divmod(len(part), world_size)
        first = rank * base + min(rank, extra)
        mine = part[first : first + base + (rank < extra)]
        filler = len(mine) == 0
        parts.append((tuple((part[:1] if filler else mine).tolist()), filler))
    return parts


class Limits(Protocol):
    """How long to train, as the section `train` says it."""

    @property
    def max_epochs(self) -> int | None: ...
    @property
    def max_steps(self) -> int | None: ...


@dataclass(frozen=True)
class Length:
    """How many optimizer steps a training has."""

    steps: int
    scheduled: int
    """What the learning rate's schedule is stretched over: steps that are left out on the way don't change it."""


@dataclass(frozen=True)
class Plan:
    """How an epoch of `num_samples` is cut into optimizer steps."""

    num_samples: int
    batch_size: int
    world_size: int = 1
    accumulate: int = 1
    seed: int = 0
    drop_last: bool = False
    kept_global_batch: int | None = None
    """The global batch of a run that began with another number of processes; micro-batches are as many as it takes."""

    @property
    def global_batch(self) -> int:
        """Samples per optimizer step over all ranks and micro-batches."""
        return self.kept_global_batch or self.batch_size * self.world_size * self.accumulate

    @property
    def steps_per_epoch(self) -> int:
        ratio = self.num_samples / self.global_batch
        return math.floor(ratio) if self.drop_last else math.ceil(ratio)

    def after(self, consumed: int) -> int:
        """The value of `consumed` after the optimizer step that starts at `consumed`."""
        left = self.num_samples - consumed % self.num_samples
        if left <= self.global_batch:
            return consumed + left
        behind = left - self.global_batch
        skip = behind if self.drop_last and behind < self.global_batch else 0
        return consumed + self.global_batch + skip

    def steps_left(self, consumed: int, max_epochs: int) -> int:
        """Optimizer steps from `consumed` to the end of epoch `max_epochs`."""
        whole_epochs = max_epochs - 1 - consumed // self.num_samples
        if whole_epochs < 0:
            return 0
        left = self.num_samples - consumed % self.num_samples
        # With drop_last, `after` never leaves less than a batch, but a resume with a larger batch may find less.
        this_epoch = max(1, left // self.global_batch) if self.drop_last else math.ceil(left / self.global_batch)
        return this_epoch + whole_epochs * self.steps_per_epoch

    def length(self, step: int, consumed: int, limits: Limits, left_out: Collection[int] = ()) -> Length:
        """Optimizer steps of the whole training, of which `step` are done, having used `consumed` samples.

        `left_out` are the values of `consumed` at which steps begin that are not taken.
        """
        nominal = math.inf
        if limits.max_epochs is not None:
            passed = sum(start < consumed for start in left_out)
            nominal = step + passed + self.steps_left(consumed, limits.max_epochs)
        most = limits.max_steps or math.inf
        return Length(int(min(nominal - len(left_out), most)), int(min(nominal, most)))

    def training(self, consumed: int, rank: int, left_out: Collection[int] = ()) -> Iterator[MicroBatch]:
        """Micro-batches of `rank` from `consumed` on, epoch after epoch, without end.

        Steps that begin at a value of `consumed` in `left_out` are passed over.
        """
        while consumed in left_out:
            consumed = self.after(consumed)
        while True:
            epoch, offset = divmod(consumed, self.num_samples)
            chunk = epoch_order(self.num_samples, self.seed, epoch)[offset : offset + self.global_batch]
            consumed = self.after(consumed)
            while consumed in left_out:
                consumed = self.after(consumed)
            parts = split(chunk, self.batch_size, self.world_size, rank)
            for number, (indices, filler) in enumerate(parts, 1):
                yield MicroBatch(epoch, indices, filler, number == len(parts), consumed)

    def evaluation(self, rank: int) -> Iterator[MicroBatch]:
        """Micro-batches of `rank` that cover the data set once, in its own order."""
        for indices, filler in split(np.arange(self.num_samples), self.batch_size, self.world_size, rank):
            yield MicroBatch(0, indices, filler, True, 0)

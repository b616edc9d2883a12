"""The contract between a recipe and the loop: data that are functions, losses that are sums."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trainer.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from serving.signature import Signature

Batch = dict[str, Any]
"""Tensors by name, first dimension the sample, plus `bad`: a list of `(index, reason)` for samples that
could not be read and were left out of the tensors, and for text `num_tokens`, padding not counted. A batch of
which nothing is left has tensors of length 0."""


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """64-bit seed of all randomness of one sample in one epoch, whichever rank or worker draws it."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{index}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


class Dataset(Protocol):
    """One split: a pure function from (epoch, indices) to a batch. Runs in data workers."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int], epoch: int) -> Batch:
        """Load these samples, in this order, with the randomness of `sample_seed(seed, epoch, index)`."""
        ...


class Data(Protocol):
    """A data set: what `recipes/data/<name>.py: build(config, seed)` returns."""

    fingerprint: str
    """Hash of what the data are (files with sizes and times, or bytes); part of a run's lineage."""

    def split(self, name: str) -> Dataset | None:
        """The split `train`, `val` or `test`; None where the data set has no such split."""
        ...


@dataclass(frozen=True)
class Pool:
    """The samples of a data set that may be trained on: those of `train` and `val` together, `test` not among them."""

    size: int
    labels: NDArray[np.integer[Any]] | None = None
    """[size] class of each sample; None where they have none."""
    keys: NDArray[Any] | None = None
    """[size] what `holdout.group_by` names, of each sample: equal ones are a group, or smaller ones are earlier; None
    where nothing is named."""
    same: NDArray[Any] | None = None
    """[size] equal for samples that say the same, and should not be on both sides; None where nobody looked."""


class Divisible(Data, Protocol):
    """A data set whose `train` and `val` can be cut anew: what the section `holdout` needs."""

    def pool(self, group_by: str | None) -> Pool:
        """All samples that may be trained on, in an order that never changes.

        Raises UserError for a `group_by` that it does not know.
        """
        ...

    def divide(self, train: NDArray[np.int64], val: NDArray[np.int64] | None) -> Data:
        """The same data set with these samples of the pool, by their index in it, as `train` and `val`; no `val` where
        that is None.

        Validation samples are seen as at evaluation, wherever they were before; `test` is as it was. Whatever the data
        set says of its training samples (counts of classes, say) and its fingerprint are those of the new ones.
        """
        ...


@dataclass(frozen=True)
class PreviewSample:
    """One sample as the model sees it."""

    place: str
    """Where it comes from, e.g. `file.jsonl:17`."""
    pieces: Sequence[tuple[str, bool]]
    """Its text in parts, each with whether the loss counts it."""
    tokens: int
    targets: int
    """Of the tokens, those that the loss counts."""


@dataclass(frozen=True)
class Preview:
    """What a recipe's `preview(config, data, init_from, split, num, seed)` returns: `trainer data preview` shows it."""

    samples: Sequence[PreviewSample]
    lines: Sequence[str]
    """What there is to know about the split, for a reader."""
    facts: Mapping[str, Any]
    """The same as plain data."""


Interval = tuple[float, float, float]
"""A value, and the lower and upper end of its 95 % interval."""


@dataclass(frozen=True)
class Difference:
    """Of one metric between two evaluations of the same samples."""

    metric: str
    before: Interval
    after: Interval
    change: Interval
    """After minus before, drawn together, which is sharper than the two intervals."""


class Metrics(ABC):
    """Exact metrics of one evaluation: sums that add over batches and over ranks, finished once at the end."""

    sums: dict[str, torch.Tensor]
    """Tensors on the model's device; ranks are merged by adding them, key by key."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Values by bare name (`accuracy`, not `val/accuracy`)."""

    def write(self, folder: Path) -> list[Path]:
        """Write pictures and tables into `folder`, which exists; returns the files. Rank 0 only."""
        return []

    def compare(self, before: Path) -> list[Difference]:
        """What has changed since `write` wrote into `before`; shown when the training is done. Rank 0 only."""
        return []


class Pretrained(Protocol):
    """Weights that a model began with, and that can be loaded again: `init_from`, found."""

    @property
    def name(self) -> str:
        """`init_from` as the config has it."""
        ...

    @property
    def kind(self) -> str:
        """`hub` where the name is one that everybody knows, else what the file or folder of that name is."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of the weights, wherever they lie."""
        ...

    @property
    def source(self) -> str:
        """Where another program finds them: a hub id or the whole path of a folder."""
        ...

    @property
    def license(self) -> str | None: ...

    def load(self, dtype: torch.dtype, attention: str | None, quantization: Any = None) -> torch.nn.Module:
        """The model with its weights."""
        ...


@dataclass(frozen=True)
class Servable:
    """What `trainer export` makes a bundle of: a program, and how samples come to it."""

    module: torch.nn.Module
    """Takes tensors in the signature's order, gives a tensor or a tuple of them in its order; holds `task.model`."""
    signature: Signature
    preprocessing: dict[str, Any]
    """From a client's sample to the program's inputs: `kind` is a module of `serving.inputs`, the rest its options."""
    postprocessing: dict[str, Any]
    """`kind` is a module of `serving.outputs`."""
    inputs: Callable[[Batch], tuple[torch.Tensor, ...]]
    """What the program takes, out of an evaluation batch on the device."""
    answer: Callable[[torch.nn.Module, Batch], tuple[torch.Tensor, ...]]
    """The evaluation's own answers to a batch, by the model that it evaluates, in the order of the outputs."""
    request: Callable[[str, int], Any]
    """(split, index) -> the sample as a client would send it: plain data for JSON."""
    measure: Callable[[Sequence[torch.Tensor], Batch, Metrics], None] | None = None
    """Adds a program's outputs for a batch, all on the CPU, to the metrics, as `Task.evaluate` adds the model's own;
    without it, int8 and bf16 are compared by their answers alone."""


class Task(ABC):
    """What is learnt: a model, its data, its loss, its metrics. One task is built per process."""

    model: torch.nn.Module
    data: Data
    """What is trained and evaluated on: the data set that the recipe was given, or what it made of it."""
    pretrained: Pretrained | None = None
    """Where the model's weights come from. Those that are frozen are then left out of checkpoints, and a run goes on
    with a base of the same fingerprint only."""
    tokenizer: Any = None
    """Of a language model: transformers' tokenizer, with the chat template that is trained."""

    @abstractmethod
    def loss(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, float]:
        """Training loss of one micro-batch on the device, as (sum, count).

        The loop divides the sum of sums by the sum of counts, over all ranks and accumulated micro-batches.
        The sum is a scalar with a graph; the count is a Python number (samples, tokens, or summed class
        weights), best known without waiting for the device. `model` is the wrapped `self.model`.
        """

    answers_wanted: bool = False
    """Whether `answers` makes any; not possible where the model is sharded."""

    def answers(self, split: str, rank: int, world_size: int, beat: Callable[[], None]) -> list[dict[str, Any]]:
        """What the model says to some samples of a split: this rank's share of them. `beat` is a sign of life."""
        return []

    def judge(self, answers: list[dict[str, Any]], folder: Path) -> dict[str, float]:
        """Measure the answers of all ranks, and write them into `folder`, which exists. Rank 0 only."""
        return {}

    def compare_answers(self, answers: list[dict[str, Any]], before: Path) -> list[Difference]:
        """What has changed since `judge` wrote into `before`, if it did. Rank 0 only."""
        return []

    def servable(self) -> Servable:
        """How this task is served. Raises UserError where it does not say."""
        raise UserError(
            f"recipe: {type(self).__module__} does not say how it is served: give its task a method `servable`"
        )

    @abstractmethod
    def metrics(self, device: torch.device) -> Metrics:
        """Fresh metrics with all sums at zero."""

    @abstractmethod
    def evaluate(self, model: torch.nn.Module, batch: Batch, metrics: Metrics) -> None:
        """Add one batch to the metrics; called without gradients and with the model in evaluation mode."""

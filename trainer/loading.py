"""From a plan to batches on the device: data workers, fillers, pinned memory."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from trainer.config import Loading
from trainer.errors import TrainerError
from trainer.sampling import MicroBatch
from trainer.task import Batch, Dataset

MAX_FILLER_TRIES = 100
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


@dataclass
class Loaded:
    """A micro-batch and its samples."""

    micro: MicroBatch
    batch: Batch
    filler: bool
    """No sample of the batch counts: it only keeps this rank in step with the others."""

    def pin_memory(self) -> Loaded:
        """Called by the DataLoader's pinning thread: copies to the accelerator then run beside the computation."""
        self.batch = {name: v.pin_memory() if isinstance(v, torch.Tensor) else v for name, v in self.batch.items()}
        return self


class _Fetch:
    """A map from micro-batch to loaded samples, run in the data workers."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, micro: MicroBatch) -> Loaded:
        batch = self.dataset.batch(micro.indices, micro.epoch)
        if len(batch["bad"]) < len(micro.indices):
            return Loaded(micro, batch, micro.filler)
        bad = batch["bad"]
        for index in range(min(len(self.dataset), MAX_FILLER_TRIES)):
            batch = self.dataset.batch([index], micro.epoch)
            if not batch["bad"]:
                return Loaded(micro, {**batch, "bad": bad}, filler=True)
        raise TrainerError(f"the first {MAX_FILLER_TRIES} samples of the data set can't be read: {bad[0][1]}")


def _start_worker(worker: int, parent: int) -> None:
    """Leave signals to the training process: a scheduler's SIGTERM goes to the whole process group."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        # Torch's workers look for their parent between two batches only; one that hangs in a read would stay for ever.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    torch.set_num_threads(1)


def _unchanged(loaded: Any) -> Any:
    return loaded


def load(dataset: Dataset, micros: Iterable[MicroBatch], loading: Loading, device: torch.device) -> Iterator[Loaded]:
    """Load `micros` in order, ahead of their use where there are workers, and bring them to `device`."""
    fetch = _Fetch(dataset)
    batches: Iterable[Loaded]
    if loading.workers == 0:
        batches = (fetch[micro] for micro in micros)
    else:
        batches = DataLoader(
            fetch,  # type: ignore[arg-type]  # a map by micro-batch, not by number
            sampler=micros,
            batch_size=None,
            num_workers=loading.workers,
            prefetch_factor=loading.prefetch,
            collate_fn=_unchanged,
            worker_init_fn=partial(_start_worker, parent=os.getpid()),
            # A new iterator draws a seed; drawn from the job's own random state, a resumed run had other bits.
            generator=torch.Generator(),
            pin_memory=device.type == "cuda",
            # Forked workers share the parent's imports and index arrays; fresh interpreters cost seconds.
            multiprocessing_context="fork",
        )
    for loaded in batches:
        if device.type != "cpu":
            loaded.batch = {name: _to_device(value, device) for name, value in loaded.batch.items()}
        yield loaded


def _to_device(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value

"""From a plan to batches on the device: data workers, fillers, pinned memory."""

from __future__ import annotations

import copy
import os
import signal
import traceback
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from functools import partial
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch.utils.data import DataLoader

from trainer import environment
from trainer.config import Loading
from trainer.errors import UserError
from trainer.sampling import MicroBatch
from trainer.task import Batch, Dataset

MAX_FILLER_TRIES = 100
LEFT_TO_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that are a wish to stop, which the training process answers."""


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

    def __getitem__(self, micro: MicroBatch) -> Loaded | _Failure:
        try:
            return self.load(micro)
        except Exception as error:
            return _Failure(_transferable(error), traceback.format_exc())

    def load(self, micro: MicroBatch) -> Loaded:
        """The samples of `micro`, or, where none can be read, one of the data set's first in their place."""
        batch = self.dataset.batch(micro.indices, micro.epoch)
        if len(batch["bad"]) < len(micro.indices):
            return Loaded(micro, batch, micro.filler)
        bad = batch["bad"]
        tries = min(len(self.dataset), MAX_FILLER_TRIES)
        for index in range(tries):
            batch = self.dataset.batch([index], micro.epoch)
            if not batch["bad"]:
                return Loaded(micro, {**batch, "bad": bad}, filler=True)
        raise UserError(f"none of the first {tries} samples of the data set can be read: {bad[0][1]}")


@dataclass(frozen=True)
class _Failure:
    """An exception of a data worker, on its way to the training process."""

    error: Exception
    trace: str


class _WorkerTraceback(Exception):
    """Shows under --debug where in the worker it happened."""


def _transferable(error: Exception) -> Exception:
    """The exception itself, or its text where it can't be sent to another process."""
    try:
        ForkingPickler.dumps(error)
        return copy.copy(error)  # made anew the way the receiver will
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _start_worker(worker: int, parent: int) -> None:
    """Leave signals to the training process: a scheduler's SIGTERM goes to the whole process group."""
    for number in LEFT_TO_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)
    # Torch's workers look for their parent between two batches only; one that hangs in a read would stay for ever.
    environment.signal_at_parents_end(signal.SIGKILL, parent)
    torch.set_num_threads(1)


def _unchanged(loaded: Any) -> Any:
    return loaded


def load(
    dataset: Dataset, micros: Iterable[MicroBatch], loading: Loading, device: torch.device
) -> Generator[Loaded, None, None]:
    """Load `micros` in order, ahead of their use where there are workers, and bring them to `device`.

    Close the iterator when done: its workers end then, and a process does not end before its workers.
    """
    fetch = _Fetch(dataset)
    if loading.workers == 0:
        for micro in micros:
            yield _moved(fetch.load(micro), device)
        return
    loader: DataLoader[Loaded | _Failure] = DataLoader(
        fetch,  # type: ignore[arg-type]  # a map by micro-batch, not by number
        sampler=micros,
        batch_size=None,
        num_workers=loading.workers,
        prefetch_factor=loading.prefetch,
        collate_fn=_unchanged,
        worker_init_fn=partial(_start_worker, parent=os.getpid()),
        # Each new iterator draws a seed: from the job's own random state, a resumed run would go on with other bits.
        generator=torch.Generator(),
        pin_memory=device.type == "cuda",
        # Forked workers share the parent's imports and index arrays; fresh interpreters cost seconds.
        multiprocessing_context="fork",
    )
    # Held back while workers are forked: until they ignore it, a scheduler's signal to the group would end them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_THE_PARENT)
    try:
        batches: Any = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        for loaded in batches:
            if isinstance(loaded, _Failure):
                raise loaded.error from _WorkerTraceback(f"\n{loaded.trace}")
            yield _moved(loaded, device)
    finally:
        batches._shutdown_workers()
        for worker in batches._workers:
            worker.kill()  # what still hangs in a read: it does not listen to the SIGTERM that torch sends
            worker.join(5)


def _moved(loaded: Loaded, device: torch.device) -> Loaded:
    if device.type != "cpu":
        loaded.batch = {name: _to_device(value, device) for name, value in loaded.batch.items()}
    return loaded


def _to_device(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value

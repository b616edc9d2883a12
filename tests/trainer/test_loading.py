"""Data workers: the same batches in the same order, errors as they were, and nobody left behind."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from trainer.config import Loading
from trainer.errors import UserError
from trainer.loading import Loaded, load
from trainer.sampling import MicroBatch, Plan
from trainer.task import Batch

CPU = torch.device("cpu")


class Numbers:
    """Each sample is its index; `act` may do something else before."""

    def __init__(self, act: Callable[[Sequence[int]], Any] = lambda indices: None, bad: Sequence[int] = ()) -> None:
        self.act, self.bad = act, bad

    def __len__(self) -> int:
        return 50

    def batch(self, indices: Sequence[int], epoch: int) -> Batch:
        self.act(indices)
        good = [index for index in indices if index not in self.bad]
        return {"x": torch.tensor(good), "bad": [(i, f"{i} is bad") for i in indices if i in self.bad]}


def first(count: int, dataset: Numbers, workers: int, plan: Plan | None = None) -> list[Loaded]:
    """The first batches of a training; its workers end with this call."""
    micros = (plan or Plan(50, 4, accumulate=2)).training(0, 0)
    with closing(load(dataset, micros, Loading(workers=workers, prefetch=2), CPU)) as batches:
        return list(islice(batches, count))


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_bring_the_same_batches_in_the_same_order(workers: int) -> None:
    def jitter(indices: Sequence[int]) -> None:
        time.sleep(0.002 * (sum(indices) % 3))

    alone, together = first(20, Numbers(), 0), first(20, Numbers(jitter), workers)
    assert [loaded.micro for loaded in together] == [loaded.micro for loaded in alone]
    assert [loaded.batch["x"].tolist() for loaded in together] == [loaded.batch["x"].tolist() for loaded in alone]
    assert not multiprocessing.active_children()


def test_loading_draws_nothing_from_the_random_states_of_the_job() -> None:
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=True)[1].tolist())  # type: ignore[index]
    for workers in (0, 2):
        first(3, Numbers(), workers)
        assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
        assert np.random.get_state(legacy=True)[1].tolist() == states[2]  # type: ignore[index]


class Picky(Exception):
    """Can't be made anew from its arguments, as an exception that goes between processes must."""

    def __init__(self, colour: str, number: int) -> None:
        super().__init__(f"{colour} {number}")


class Holding(Exception):
    """Holds what can't be sent."""

    def __init__(self) -> None:
        super().__init__("it holds a lock")
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ValueError("no such colour"), ValueError, "no such colour"),
        (UserError("data.path: is gone"), UserError, "data.path: is gone"),
        (KeyError("colour"), KeyError, "'colour'"),
        (OSError(5, "Input/output error", "x.png"), OSError, "[Errno 5] Input/output error: 'x.png'"),
        (Picky("blue", 3), RuntimeError, "Picky: blue 3"),
        (Holding(), RuntimeError, "Holding: it holds a lock"),
    ],
)
def test_an_error_of_a_worker_is_raised_as_it_was(error: Exception, kind: type[Exception], text: str) -> None:
    def fail(indices: Sequence[int]) -> None:
        raise error

    with pytest.raises(kind) as caught:
        first(1, Numbers(fail), 1)
    assert str(caught.value) == text
    assert "in fail" in "".join(traceback.format_exception(caught.value))  # --debug shows where in the worker
    del caught
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_is_an_error_and_no_hang() -> None:
    def die(indices: Sequence[int]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match=r"worker .* (killed by signal: Killed|exited unexpectedly)"):
        first(1, Numbers(die), 2)
    assert not multiprocessing.active_children()


def test_a_worker_that_hangs_does_not_hold_up_the_end() -> None:
    def hang(indices: Sequence[int]) -> None:
        if 50 not in indices and calls.value:
            time.sleep(1000)
        calls.value = 1

    calls = multiprocessing.Value("i", 0)
    before = time.monotonic()
    assert len(first(1, Numbers(hang), 1)) == 1
    assert time.monotonic() - before < 30 and not multiprocessing.active_children()


def test_workers_do_not_listen_to_the_signals_of_the_job() -> None:
    def signal_oneself(indices: Sequence[int]) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(os.getpid(), number)

    assert len(first(5, Numbers(signal_oneself), 1)) == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_of_bad_samples_only_becomes_a_filler_that_names_them(workers: int) -> None:
    order = [loaded.batch["x"].tolist() for loaded in first(3, Numbers(), 0)]
    bad = [*order[1], order[2][0], 0]
    _, empty, partly = first(3, Numbers(bad=bad), workers)
    assert empty.filler and not empty.micro.filler
    assert sorted(empty.batch["bad"]) == [(i, f"{i} is bad") for i in sorted(order[1])]
    assert empty.batch["x"].tolist() == [min(i for i in range(50) if i not in bad)]
    assert not partly.filler and partly.batch["x"].tolist() == order[2][1:]


def test_where_no_sample_can_be_read_the_user_hears_so() -> None:
    with pytest.raises(UserError, match=r"none of the first 50 samples of the data set can be read: .* is bad"):
        first(1, Numbers(bad=range(50)), 0)


def test_fillers_of_the_plan_stay_fillers() -> None:
    plan = Plan(2, 1, world_size=3)
    micros: list[MicroBatch] = [next(iter(plan.training(0, rank))) for rank in range(3)]
    loaded = list(load(Numbers(), micros, Loading(), CPU))
    assert [item.filler for item in loaded] == [False, False, True] and len(loaded[2].batch["x"]) == 1

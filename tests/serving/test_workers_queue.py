"""First come, first served; large requests are cut over batches; who no longer waits is left out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np

from serving.inputs import Encoded
from serving.workers.queue import Queue, Request, Taken

KILOBYTE = 1024


def on_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(test())

    run.__name__ = test.__name__
    return run


def request(*names: str, deadline: float = 1.0, size: int = KILOBYTE) -> Request:
    samples = [Encoded(b"." * size, name) for name in names]
    return Request(samples, 0.0, deadline, asyncio.get_running_loop().create_future())


def names(taken: Taken | None) -> str:
    return "" if taken is None else "".join(sample.where for sample in taken.samples)  # type: ignore[union-attr]


@on_a_loop
async def test_a_large_request_is_cut_and_keeps_its_place() -> None:
    queue = Queue(100, 1 << 20)
    first, large, last = request("a"), request(*"bcdefg"), request("h")
    for one in (first, large, last):
        queue.put(one)
    assert queue.length == 8
    batches = []
    while (taken := queue.take(4, 1 << 20)) is not None:
        batches.append(taken)
    assert [names(taken) for taken in batches] == ["abcd", "efgh"] and not queue.length
    rows: list[Any] = [(np.array(i),) for i in range(8)]
    batches[1].settle(rows[4:])
    assert last.answer.done() and not large.answer.done()
    batches[0].settle(rows[:4])
    assert [int(row[0]) for row in large.answer.result()] == [1, 2, 3, 4, 5, 6]  # type: ignore[index, misc]
    assert first.answer.result() == rows[:1]


@on_a_loop
async def test_bounds_of_samples_and_bytes() -> None:
    queue = Queue(3, 4 * KILOBYTE)
    assert queue.fits(request("a", size=100 * KILOBYTE)), "an empty queue takes what one request may have"
    queue.put(request("a", "b"))
    assert queue.fits(request("c")) and not queue.fits(request("c", "d"))
    assert not queue.fits(request("c", size=3 * KILOBYTE))
    queue.put(request("c"))
    assert names(queue.take(10, KILOBYTE)) == "a", "a batch is bounded in bytes, too"
    assert names(queue.take(10, 1)) == "b", "and never empty"
    assert names(queue.take(10, KILOBYTE)) == "c"
    assert queue.take(10, KILOBYTE) is None and queue.fits(request("x", "y", "z"))


@on_a_loop
async def test_who_no_longer_waits_is_left_out_and_makes_room() -> None:
    queue = Queue(4, 1 << 20)
    gone, late, here = request("a", "b"), request("c"), request("d")
    for one in (gone, late, here):
        queue.put(one)
    gone.answer.cancel()
    queue.give_up(gone)
    late.fail(TimeoutError())  # not given up, only answered: it is left out when its turn comes
    assert queue.length == 2 and queue.fits(request("e", "f"))
    assert names(queue.take(4, 1 << 20)) == "d" and queue.length == 0
    assert late.answer.exception() is not None


@on_a_loop
async def test_the_rest_of_a_request_that_failed_is_not_run() -> None:
    queue = Queue(9, 1 << 20)
    large = request(*"abcd")
    queue.put(large)
    queue.put(request("e"))
    first = queue.take(2, 1 << 20)
    assert first is not None
    first.fail(RuntimeError())
    assert names(queue.take(9, 1 << 20)) == "e" and not queue.length
    assert isinstance(large.answer.exception(), RuntimeError)


@on_a_loop
async def test_what_was_not_begun_goes_first_again() -> None:
    queue = Queue(9, 1 << 20)
    for name in "abc":
        queue.put(request(name))
    begun, unwanted = queue.take(1, 1 << 20), queue.take(1, 1 << 20)
    assert begun is not None and unwanted is not None
    queue.put_back(begun)
    queue.put_back(unwanted)
    unwanted.fail(TimeoutError())
    assert queue.length == 3
    assert [names(queue.take(9, 1 << 20)) for _ in range(2)] == ["a", "c"] and not queue.length

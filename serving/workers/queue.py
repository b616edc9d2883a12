"""Requests that wait, first come first served, and the batches cut from them. No processes, no event loop's own."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serving.workers.messages import size_of

if TYPE_CHECKING:
    from serving.inputs import Arrays, Encoded
    from serving.workers.messages import Item


class Request:
    """Samples of one client, which may run in several batches."""

    __slots__ = ("answer", "arrived", "bytes_each", "deadline", "next", "open", "results", "samples")

    def __init__(
        self, samples: Sequence[Encoded | Arrays], arrived: float, deadline: float, answer: asyncio.Future[list[Item]]
    ):
        self.samples = samples
        self.arrived = arrived
        self.deadline = deadline
        """Seconds of the loop's clock."""
        self.answer = answer
        self.results: list[Item | None] = [None] * len(samples)
        self.open = len(samples)
        """Results that are missing."""
        self.next = 0
        """The first sample that no batch has taken."""
        self.bytes_each = [size_of(sample) for sample in samples]

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for it: not once it was given up, failed, or its time was up."""
        return not self.answer.done()

    def settle(self, position: int, result: Item) -> None:
        """One sample's result; the last completes the answer."""
        self.results[position] = result
        self.open -= 1
        if not self.open and not self.answer.done():
            self.answer.set_result(self.results)  # type: ignore[arg-type]  # none is missing

    def fail(self, error: Exception) -> None:
        """Answer with an error."""
        if not self.answer.done():
            self.answer.set_exception(error)


@dataclass(slots=True)
class Taken:
    """A batch: which samples of which requests."""

    samples: list[Encoded | Arrays]
    origins: list[tuple[Request, int, int]]
    """(request, its first sample here, how many of them)."""
    began: float = 0.0
    """When a worker got to it, on the monotonic clock, as far as the front can know."""

    @property
    def deadline(self) -> float:
        """The last of its requests' deadlines."""
        return max(request.deadline for request, _, _ in self.origins)

    def settle(self, results: Sequence[Item]) -> None:
        """Hand each request its results."""
        start = 0
        for request, first, count in self.origins:
            for offset in range(count):
                request.settle(first + offset, results[start + offset])
            start += count

    def fail(self, error: Exception) -> None:
        """Fail each request that has a sample here."""
        for request, _, _ in self.origins:
            request.fail(error)


class Queue:
    """First in, first out, bounded in samples and bytes."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self.most, self._most_bytes = most, most_bytes
        self._requests: deque[Request] = deque()
        self._returned: deque[Taken] = deque()
        """Batches that a worker was given and never began."""
        self.length = 0
        """Samples that wait."""
        self._bytes = 0

    def fits(self, request: Request) -> bool:
        """Whether there is room. An empty queue takes any number of bytes."""
        return self.length + len(request.samples) <= self.most and (
            not self.length or self._bytes + sum(request.bytes_each) <= self._most_bytes
        )

    def put(self, request: Request) -> None:
        """At the end."""
        self._requests.append(request)
        self.length += len(request.samples)
        self._bytes += sum(request.bytes_each)

    def put_back(self, taken: Taken) -> None:
        """A batch that was not begun goes first."""
        self._returned.append(taken)
        self.length += len(taken.samples)

    def give_up(self, request: Request) -> None:
        """Its samples that wait count no more; the rest of it is skipped when its turn comes."""
        left = len(request.samples) - request.next
        self.length -= left
        self._bytes -= sum(request.bytes_each[request.next :])
        request.next = len(request.samples)

    def oldest(self) -> float | None:
        """When the first that waits arrived."""
        self._skip()
        if self._returned:
            return 0.0
        return self._requests[0].arrived if self._requests else None

    def take(self, most: int, most_bytes: int) -> Taken | None:
        """Up to `most` samples from the front; at least one, however large. None where nobody waits."""
        while self._returned:
            taken = self._returned.popleft()
            self.length -= len(taken.samples)
            if any(request.is_wanted for request, _, _ in taken.origins):
                return taken
        self._skip()
        if not self._requests:
            return None
        taken = Taken([], [])
        size = 0
        while self._requests and len(taken.samples) < most:
            request = self._requests[0]
            first = request.next
            while request.next < len(request.samples) and len(taken.samples) < most:
                weight = request.bytes_each[request.next]
                if taken.samples and size + weight > most_bytes:
                    break
                taken.samples.append(request.samples[request.next])
                size += weight
                request.next += 1
            if request.next > first:
                taken.origins.append((request, first, request.next - first))
            if request.next < len(request.samples):
                break
            self._requests.popleft()
            self._skip()
        self.length -= len(taken.samples)
        self._bytes -= size
        return taken

    def fail_all(self, error: Exception) -> None:
        """Nobody will take what waits."""
        for taken in self._returned:
            taken.fail(error)
        for request in self._requests:
            request.fail(error)
        self._returned.clear()
        self._requests.clear()
        self.length = self._bytes = 0

    def _skip(self) -> None:
        while self._requests and (not self._requests[0].is_wanted or not self._requests[0].samples):
            request = self._requests.popleft()
            if request.next < len(request.samples):
                self.give_up(request)

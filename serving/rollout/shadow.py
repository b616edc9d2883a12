"""Copies of the traffic to a version that answers nobody, compared with the answers that clients got."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from multidict import CIMultiDict

from serving.rollout.answers import deviation, label_of, predictions_of
from serving.rollout.evidence import Observation
from serving.rollout.forward import Answer, send
from serving.rollout.metrics import Metrics
from serving.rollout.routing import Routing

if TYPE_CHECKING:
    import aiohttp
    from aiohttp import web

HEADER = "X-Rollout-Shadow"
DEADLINE_SECONDS = 30.0
SAME = 1e-3
"""Two answers deviate no more than this to count as the same."""


class Shadow:
    """Makes the copies. The client's request waits for nothing here, and no failure here reaches it."""

    def __init__(
        self,
        routing: Routing,
        session: aiohttp.ClientSession,
        metrics: Metrics,
        seen: Callable[[Observation], None],
        count: Callable[[str], None],
    ) -> None:
        self._routing, self._session, self._metrics, self._seen = routing, session, metrics, seen
        self._told = count
        self._under_way: set[asyncio.Task[None]] = set()
        self._draw = random.Random()

    def copy(self, request: web.BaseRequest, headers: CIMultiDict[str], body: bytes) -> Callable[[Answer], None] | None:
        """Start a copy; what is given back takes the client's answer. None where too many are under way."""
        if self._routing.new is None or not self._routing.new.ready:
            return None
        if len(self._under_way) >= self._routing.plan.shadow_in_flight:
            self._count("left_out")
            return None
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(self._pair(request, CIMultiDict(headers), body, answered))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return lambda answer: None if answered.done() else answered.set_result(answer)

    async def close(self) -> None:
        """Give up what is under way."""
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)

    async def _pair(
        self, request: web.BaseRequest, headers: CIMultiDict[str], body: bytes, answered: asyncio.Future[Answer]
    ) -> None:
        new = self._routing.new
        if new is None:
            return
        headers[HEADER] = "1"
        new.in_flight += 1
        try:
            deadline = time.monotonic() + DEADLINE_SECONDS
            copied = await send(self._session, new, request, headers, body, deadline)
        finally:
            new.in_flight -= 1
        if copied.response is not None:  # a stream: only its beginning is compared
            copied.response.close()
        self._metrics.request("shadow", new.name, copied.status, copied.seconds)
        try:
            told = await asyncio.wait_for(answered, DEADLINE_SECONDS)
        except TimeoutError:
            return
        self._count(compare(told, copied))
        # Of a pair, a coin chooses which one counts: then nobody can guess the coin if both are alike, see `betting`.
        is_new = self._draw.random() < 0.5
        one = copied if is_new else told
        label = label_of(one.headers.get("Content-Type", ""), one.body) if one.body and one.status == 200 else None
        self._seen(Observation(is_new, 0.5, one.seconds, one.status, label))

    def _count(self, result: str) -> None:
        self._told(result)
        self._metrics.counts["rollout_shadow_total", result] += 1


def compare(told: Answer, copied: Answer) -> str:
    """How a copy's answer differs from the client's."""
    if told.status != copied.status:
        return "other_status"
    if told.body is None or copied.body is None:
        return "same"  # streams: their beginnings agree
    labels = [label_of(one.headers.get("Content-Type", ""), one.body or b"") for one in (told, copied)]
    if labels[0] != labels[1]:
        return "other_label"
    return "same" if told.body == copied.body or _near(told.body, copied.body) else "other_answer"


def _near(one: bytes, other: bytes) -> bool:
    pair: list[Any] = []
    for body in (one, other):
        try:
            pair.append(predictions_of(body))
        except ValueError:
            return False
    return deviation(*pair) <= SAME

"""The front's HTTP side: each request is sent to a version, and once more to the other where the first one fails."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

from multidict import CIMultiDict

from serving.rollout.answers import label_of
from serving.rollout.evidence import LEFT, Observation
from serving.rollout.forward import Answer, Body, TooLarge, end_to_end, send
from serving.rollout.metrics import Metrics
from serving.rollout.routing import Routing
from serving.rollout.split import Route
from serving.rollout.versions import Version

if TYPE_CHECKING:
    import aiohttp
    from aiohttp import web

SANE_ID = re.compile(r"[\x21-\x7e]{1,128}")
ANALYSED = ("POST",)
"""Methods of predictions: only these are evidence."""
Seen = Callable[[Observation, Route, str, Version], None]
"""Told of each request that was sent to a version: what came of it, its route, its id, and the version."""
Copy = Callable[["web.BaseRequest", "CIMultiDict[str]", bytes], Callable[[Answer], None] | None]
"""Starts a shadow's copy; what it gives is to be told of the client's answer."""


class Proxy:
    """Handles the front's requests."""

    def __init__(
        self, routing: Routing, session: aiohttp.ClientSession, metrics: Metrics, seen: Seen, copy: Copy, max_body: int
    ) -> None:
        self._routing, self._session, self._metrics = routing, session, metrics
        self._seen, self._copy, self._max_body = seen, copy, max_body
        self.draining = False
        self.in_flight = 0

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        own = self._own(request)
        if own is not None:
            return own
        self.in_flight += 1
        try:
            return await self._forward(request)
        finally:
            self.in_flight -= 1

    def _own(self, request: web.BaseRequest) -> web.Response | None:
        from aiohttp import web

        match request.path:
            case "/health" | "/v2/health/live":
                return web.json_response({"status": "live"})
            case "/ready" | "/v2/health/ready":
                old = self._routing.old
                if self.draining or not old.ready:
                    reason = "draining" if self.draining else f"{old.name}: {old.reason}"
                    return web.json_response({"status": "not ready", "reason": reason}, status=503)
                return web.json_response({"status": "ready", "models": [{"name": "rollout", "version": old.name}]})
            case "/metrics":
                return web.Response(text=self._metrics.text(), content_type="text/plain")
        if request.path.startswith("/v2/repository/") and request.method == "POST" and "/models/" in request.path:
            return problem(request, 403, "forbidden", "versions are changed by a rollout: trainer deploy start")
        return None

    async def _forward(self, request: web.BaseRequest) -> web.StreamResponse:
        began = time.monotonic()
        given = request.headers.get("X-Request-Id", "")
        request_id = given if SANE_ID.fullmatch(given) else uuid.uuid4().hex
        headers = end_to_end(request.headers)
        headers["X-Request-Id"] = request_id
        if "Host" in request.headers:
            headers["X-Forwarded-Host"] = request.headers["Host"]
        client = request.remote or ""
        headers["X-Forwarded-For"] = ", ".join(filter(None, [headers.get("X-Forwarded-For"), client]))
        deadline = _deadline(headers, began)
        body = Body(request, self._max_body)
        try:
            await body.open()
            version, route = self._routing.route(request.headers, client)
            told = self._copied(request, headers, body)
            answer, version, route = await self._send(request, headers, body, deadline, version, route, request_id)
            if told is not None:
                told(answer)
            if body.too_large:
                raise TooLarge
            return await self._relay(request, answer, version, route, request_id)
        except TimeoutError:
            return problem(request, 408, "slow_client", "the body did not come in time", request_id)
        except TooLarge:
            text = f"the body is larger than {self._max_body >> 20} MB"
            return problem(request, 413, "too_large", text, request_id)

    def _copied(
        self, request: web.BaseRequest, headers: CIMultiDict[str], body: Body
    ) -> Callable[[Answer], None] | None:
        if not self._routing.mirrors or request.method not in ANALYSED or body.held is None:
            return None
        return self._copy(request, headers, body.held)

    async def _send(
        self,
        request: web.BaseRequest,
        headers: CIMultiDict[str],
        body: Body,
        deadline: float | None,
        version: Version,
        route: Route,
        request_id: str,
    ) -> tuple[Answer, Version, Route]:
        answer = await self._try(request, headers, body, deadline, version, route, request_id)
        # Alone, a version is asked once more: it may just have closed a connection that stood idle.
        other = self._routing.other(version) or version
        if not answer.failed or not self._may_repeat(answer, body, deadline, route):
            return answer, version, route
        self._metrics.counts["rollout_retries_total", "unsent" if answer.unsent else "failed"] += 1
        if answer.response is not None:
            answer.response.close()
        route = Route(other is not self._routing.old, None, route.key)
        return await self._try(request, headers, body, deadline, other, route, request_id), other, route

    def _may_repeat(self, answer: Answer, body: Body, deadline: float | None, route: Route) -> bool:
        rule = self._routing.plan.retry
        if rule == "never" or not body.repeatable or (rule == "unsent" and not answer.unsent):
            return False
        # An old version's error is its answer; that it can't be reached is not.
        return (deadline is None or time.monotonic() < deadline) and (route.is_new or answer.status in (0, 503))

    async def _try(
        self,
        request: web.BaseRequest,
        headers: CIMultiDict[str],
        body: Body,
        deadline: float | None,
        version: Version,
        route: Route,
        request_id: str,
    ) -> Answer:
        if deadline is not None:
            headers["X-Deadline-Ms"] = str(max(int((deadline - time.monotonic()) * 1000.0), 1))
        version.in_flight += 1
        began = time.monotonic()
        answer = None
        try:
            answer = await send(self._session, version, request, headers, body.content(), deadline)
            return answer
        finally:
            version.in_flight -= 1
            status = answer.status if answer is not None else LEFT
            seconds = answer.seconds if answer is not None else time.monotonic() - began
            self._metrics.request("new" if route.is_new else "old", version.name, status, seconds)
            if request.method in ANALYSED and not (body.too_large or body.broken):
                label = None
                if answer is not None and answer.body is not None and status == 200:
                    label = label_of(answer.headers.get("Content-Type", ""), answer.body)
                self._seen(Observation(route.is_new, route.share, seconds, status, label), route, request_id, version)

    async def _relay(
        self, request: web.BaseRequest, answer: Answer, version: Version, route: Route, request_id: str
    ) -> web.StreamResponse:
        from aiohttp import web

        if answer.status == 0:
            late = answer.why == "no answer in time"
            status, code = (504, "deadline") if late else (503, "unavailable")
            return problem(request, status, code, f"no version answers: {answer.why}", request_id, retry=not late)
        headers = answer.headers
        headers.setdefault("X-Request-Id", request_id)
        headers["X-Rollout-Arm"] = "new" if route.is_new else "old"
        if answer.response is None:
            return web.Response(status=answer.status, body=answer.body, headers=headers)
        version.in_flight += 1
        try:
            out = web.StreamResponse(status=answer.status, headers=headers)
            if not await self._pass_on(request, answer.response, out):
                self._seen(Observation(route.is_new, None, answer.seconds, 0), route, request_id, version)
            return out
        finally:
            version.in_flight -= 1
            answer.response.close()

    async def _pass_on(
        self, request: web.BaseRequest, response: aiohttp.ClientResponse, out: web.StreamResponse
    ) -> bool:
        """Whether all of the version's answer came."""
        import aiohttp

        if response.content_length is not None:
            out.content_length = response.content_length
        await out.prepare(request)
        try:
            async for chunk in response.content.iter_any():
                await out.write(chunk)
        except aiohttp.ClientError:
            # The client must see that the end is missing: its connection is cut, too.
            self._metrics.counts["rollout_broken_streams_total", "version"] += 1
            if request.transport is not None:
                request.transport.abort()
            return False
        await out.write_eof()
        return True


def problem(
    request: web.BaseRequest, status: int, code: str, text: str, request_id: str = "", retry: bool = False
) -> web.Response:
    """An error in the form of the part of the API that was asked."""
    from aiohttp import web

    content = {"error": text} if request.path.startswith("/v2") else {"error": {"code": code, "message": text}}
    headers = {"X-Request-Id": request_id} if request_id else {}
    if retry:
        headers["Retry-After"] = "1"
    return web.Response(
        status=status, body=json.dumps(content).encode(), content_type="application/json", headers=headers
    )


def _deadline(headers: CIMultiDict[str], began: float) -> float | None:
    text = headers.get("X-Deadline-Ms", "")
    return began + int(text) / 1000.0 if text.isascii() and text.isdigit() and len(text) < 10 else None

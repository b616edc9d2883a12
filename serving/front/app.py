"""What becomes of a request: who may, which route, its answer, and what is told about it."""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from serving.bundle import Bundle
from serving.front import predict, v2
from serving.front.access import Access
from serving.front.http import Request, Response
from serving.front.metrics import Metrics, VersionMetrics
from serving.front.refusal import Form, Refusal, of_serving, respond, retry_after
from serving.front.request_log import Line, RequestLog
from serving.front.routes import Guard, Route, Routes
from serving.front.served import Served

LONGEST_ID = 128
INTERNAL = "internal error; the server's log has it under this request's id"
_ID_SIGNS = b"-_.:/+="


@dataclass(frozen=True)
class Rules:
    """What holds for every request."""

    deadline: float
    """Seconds; a client may ask for less."""
    most_instances: int
    hashes_inputs: bool = False


@dataclass
class Outcome:
    """What is told about a request besides its status."""

    metrics: VersionMetrics | None = None
    """Of the model that was asked; None where there is none."""
    count: int = 0
    predictions: Sequence[tuple[str, float]] = ()
    error: str = ""


class App:
    """Answers requests; see `serving.front.wire.Application`."""

    def __init__(self, served: Served, access: Access, metrics: Metrics, log: RequestLog | None, rules: Rules) -> None:
        self.served, self.access, self.metrics, self.log, self.rules = served, access, metrics, log, rules
        self.routes: Routes
        """Set before the first request."""
        self.waits_for = "starting"
        """Why nothing but the open routes is answered; empty once all models are there."""
        self.is_draining = False
        self._loop = asyncio.get_running_loop()
        self._id_head = os.urandom(5).hex().encode()
        self._id_count = 0

    def admit(self, request: Request) -> Response | None:
        self._identify(request)
        form = _form(request.path)
        try:
            route = request.route = self.routes.find(request.path)
            form = route.form
            self._check(request, route)
            return None
        except Refusal as refusal:
            if self.waits_for and refusal.status == 404:  # perhaps a model that is still to come
                refusal = self._wait()
            return self._refused(request, refusal, form)

    def handle(self, request: Request) -> None:
        route: Route = request.route
        try:
            answer = route.answers[b"GET" if request.method == b"HEAD" else request.method](request)
        except Exception as error:
            response = self._failed(request, error, route.form)
            self.tell(request, response.status, Outcome(error=_reason(error)))
            return request.respond(response)
        if isinstance(answer, Response):
            if route.guard is not Guard.OPEN:
                self.tell(request, answer.status, Outcome())
            return request.respond(answer)
        request.task = self._loop.create_task(answer)  # type: ignore[arg-type]  # all of them are coroutines

    def refuse(self, request: Request, status: int, message: str, headers: bytes) -> Response:
        self._identify(request)
        return self._refused(request, Refusal(status, message, headers=headers), _form(request.path))

    async def infer(self, request: Request, parse: Callable[..., Any], render: Callable[..., Any]) -> None:
        """Answer a request for predictions, in the words of either protocol."""
        route: Route = request.route
        # Without an await up to `predict`: the version that parses is the one that runs.
        codec = self.served.codec(route.model)
        outcome = Outcome(codec.metrics)
        status = 499
        try:
            asked = parse(request, codec, self.rules.most_instances)
            outcome.count = len(asked.samples)
            rows = await route.model.predict(asked.samples, self._deadline(request))
            predict.settle(rows, codec)
            response, outcome.predictions = render(asked, rows, codec)
            status = response.status
        except Exception as error:
            response = self._failed(request, error, route.form)
            status, outcome.error = response.status, _reason(error)
        finally:
            self.tell(request, status, outcome)
        request.respond(response)

    def predict(self, request: Request) -> Awaitable[None]:
        return self.infer(request, predict.parse, predict.render)

    def open_inference(self, request: Request) -> Awaitable[None]:
        return self.infer(request, v2.parse, v2.render)

    async def run(self, request: Request, work: Awaitable[Response]) -> None:
        """Answer with what comes of `work`."""
        status, error_text = 499, ""
        try:
            response = await work
            status = response.status
        except Exception as error:
            response = self._failed(request, error, request.route.form)
            status, error_text = response.status, _reason(error)
        finally:
            self.tell(request, status, Outcome(error=error_text))
        request.respond(response)

    def not_ready(self) -> str:
        """Why the server should get no traffic; empty when it should."""
        return "draining" if self.is_draining else self.waits_for or self.served.not_ready()

    async def reload(self, model: Any) -> Bundle:
        """Reload a model from its path, counted. Raises ServingError, and the old version goes on."""
        result = "failed"
        try:
            bundle: Bundle = await model.reload()
            result = "done"
            return bundle
        finally:
            self.metrics.reloads.labels(result).inc()

    def tell(self, request: Request, status: int, outcome: Outcome) -> None:
        """Count a request, and log it."""
        seconds = time.monotonic() - request.started
        metrics = outcome.metrics or self.metrics.nobody
        metrics.answered(status, seconds)
        for label, _ in outcome.predictions:
            metrics.predicted(label)
        if self.log is None:
            return
        self.log.add(
            Line(
                time=round(time.time(), 3),
                id=request.id.decode(),
                status=status,
                ms=round(seconds * 1e3, 3),
                model=metrics.model,
                version=metrics.version,
                key=request.key,
                count=outcome.count,
                predictions=outcome.predictions,
                inputs_sha256=hashlib.sha256(request.body).hexdigest() if self.rules.hashes_inputs else "",
                error=outcome.error,
            )
        )

    def report(self, request: Request, error: BaseException) -> None:
        """Print the traceback of a defect with the request's id."""
        text = "".join(traceback.format_exception(error))
        print(f"serving: request {request.id.decode()} failed:\n{text}", end="", file=sys.stderr, flush=True)

    def internal_error(self, request: Request) -> Response:
        """The answer to a request that met a defect."""
        return respond(Refusal(500, INTERNAL), request.route.form)

    def _check(self, request: Request, route: Route) -> None:
        method = b"GET" if request.method == b"HEAD" else request.method
        if method not in route.answers:
            allowed = [*route.answers, *([b"HEAD"] if b"GET" in route.answers else [])]
            headers = b"allow: %b\r\n" % b", ".join(allowed)
            raise Refusal(405, f"this path answers {b', '.join(allowed).decode()} only", headers=headers)
        if route.guard is not Guard.OPEN:
            if self.waits_for:
                raise self._wait()
            self.access.count(request, self._name(request, route))
            asked_seconds(request)
        if b"content-encoding" in request.headers and request.headers[b"content-encoding"].lower() != b"identity":
            raise Refusal(415, "compressed bodies are not taken: send it without Content-Encoding")
        if route.needs_body:
            if not request.is_chunked and b"content-length" not in request.headers:
                raise Refusal(411, "a body is needed, with Content-Length or in chunks")
            if route.check is not None:
                route.check(request)

    def _wait(self) -> Refusal:
        return Refusal(503, f"not ready: {self.waits_for}", code="not_ready", headers=retry_after(1))

    def _name(self, request: Request, route: Route) -> str:
        try:
            check = self.access.admin if route.guard is Guard.ADMIN else self.access.client
            name = request.key = check(request)
            return name
        except Refusal:
            self.access.count(request, "")  # guessing is no quicker than asking
            raise

    def _deadline(self, request: Request) -> float:
        """`time.monotonic()` by which the answer must be there. Raises Refusal 400."""
        return request.started + min(asked_seconds(request), self.rules.deadline)

    def _identify(self, request: Request) -> None:
        """The client's own id where it is sane, else one of ours."""
        if request.id:
            return
        own = request.headers.get(b"x-request-id", b"")
        if own and len(own) <= LONGEST_ID and own.translate(None, _ID_SIGNS).isalnum():
            request.id = own
        else:
            self._id_count += 1
            request.id = b"%b-%x" % (self._id_head, self._id_count)
        request.extra = b"x-request-id: %b\r\n" % request.id

    def _failed(self, request: Request, error: Exception, form: Form) -> Response:
        refusal = error if isinstance(error, Refusal) else of_serving(error)
        if refusal is None:
            self.report(request, error)
            refusal = Refusal(500, INTERNAL)
        return respond(refusal, form)

    def _refused(self, request: Request, refusal: Refusal, form: Form) -> Response:
        if request.refusal is None:
            self.tell(request, refusal.status, Outcome(error=_reason(refusal)))
        return respond(refusal, form)


def asked_seconds(request: Request) -> float:
    """In how many the client wants its answer; infinity where it does not say. Raises Refusal 400."""
    asked = request.headers.get(b"x-deadline-ms")
    if asked is None:
        return math.inf
    try:
        milliseconds = math.nan if b"n" in asked.lower() else float(asked)  # neither `nan` nor `inf`, yet any digits
    except ValueError:
        milliseconds = math.nan
    if not milliseconds > 0:
        raise Refusal(400, "expected a number of milliseconds above 0", "X-Deadline-Ms")
    return milliseconds / 1000


def _reason(error: Exception) -> str:
    """For the log: what the client was told, without the text of defects."""
    refusal = error if isinstance(error, Refusal) else of_serving(error)
    return type(error).__name__ if refusal is None else refusal.code


def _form(path: bytes) -> Form:
    if path.startswith(b"/v2"):
        return Form.OPEN_INFERENCE
    return Form.OPENAI if path.startswith(b"/v1/") else Form.OWN

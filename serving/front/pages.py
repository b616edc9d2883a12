"""Everything that is no prediction: probes, metrics, documentation, the repository."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Awaitable
from typing import Any

import msgspec

from serving.errors import ServingError
from serving.front import docs_page, language, openapi, predict, v2
from serving.front.app import App
from serving.front.http import JSON, Request, Response
from serving.front.metrics import CONTENT_TYPE
from serving.front.refusal import Form, Refusal
from serving.front.routes import Endpoints, Guard, Route, Routes
from serving.front.served import is_language

HTML = b"text/html; charset=utf-8"
PAGE_POLICY = b"content-security-policy: default-src 'self' 'unsafe-inline'; frame-ancestors 'none'\r\n"


class Pages:
    """The handlers."""

    def __init__(self, app: App) -> None:
        self._app, self._served = app, app.served
        self._document: tuple[tuple[str, ...], bytes] = ((), b"")

    def routes(self) -> Routes:
        """The table of all routes."""
        own, v2_form = Form.OWN, Form.OPEN_INFERENCE
        fixed = {
            b"/": Route({b"GET": self.root}, Guard.OPEN, own),
            b"/health": Route({b"GET": self.health}, Guard.OPEN, own),
            b"/ready": Route({b"GET": self.ready}, Guard.OPEN, own),
            b"/metrics": Route({b"GET": self.metrics}, Guard.OPEN, own),
            b"/docs": Route({b"GET": self.docs}, Guard.OPEN, own),
            b"/openapi.json": Route({b"GET": self.openapi}, Guard.OPEN, own),
            b"/v2": Route({b"GET": self.server}, Guard.OPEN, v2_form),
            b"/v2/health/live": Route({b"GET": self.live}, Guard.OPEN, v2_form),
            b"/v2/health/ready": Route({b"GET": self.server_ready}, Guard.OPEN, v2_form),
            b"/v2/repository/index": Route({b"POST": self.index}, Guard.CLIENT, v2_form),
        }
        endpoints = Endpoints(
            predict=self._app.predict,
            infer=self._app.open_inference,
            metadata=self.metadata,
            model_ready=self.model_ready,
            load=self.load,
            language=self.language,
            check_predict=predict.check_type,
            check_infer=v2.check_type,
        )
        return Routes(fixed, endpoints, self._served)

    def root(self, request: Request) -> Response:
        return Response(307, b"", b"text/plain", b"location: /docs\r\n")

    def health(self, request: Request) -> Response:
        return Response(200, b'{"status":"live"}')

    def ready(self, request: Request) -> Response:
        reason = self._app.not_ready()
        if reason:
            return _json({"status": "not ready", "reason": reason}, 503, b"retry-after: 1\r\n")
        models = [{"name": model.name, "version": model.bundle.version} for model in self._served]
        return _json({"status": "ready", "models": models})

    def metrics(self, request: Request) -> Response:
        return Response(200, self._app.metrics.text(), CONTENT_TYPE)

    def docs(self, request: Request) -> Response:
        return Response(200, docs_page.PAGE, HTML, PAGE_POLICY)

    def openapi(self, request: Request) -> Response:
        versions = tuple(model.bundle.version for model in self._served)
        if self._document[0] != versions or not versions:
            self._document = (versions, msgspec.json.encode(openapi.document(self._served, self._app)))
        return Response(200, self._document[1])

    def live(self, request: Request) -> Response:
        return Response(200, b'{"live":true}')

    def server_ready(self, request: Request) -> Response:
        is_ready = not self._app.not_ready()
        return _json({"ready": is_ready}, 200 if is_ready else 503)

    def server(self, request: Request) -> Response:
        extensions = ["binary_tensor_data", "model_repository"]
        return _json({"name": "trainer-serving", "version": version(), "extensions": extensions})

    def metadata(self, request: Request) -> Response:
        model = request.route.model
        if is_language(model.bundle):
            empty: list[Any] = []
            rest = {"platform": "trainer_transformers", "inputs": empty, "outputs": empty}
            return _json({"name": model.name, "versions": [model.bundle.version], **rest})
        return _json(v2.metadata(self._served.codec(model)))

    def model_ready(self, request: Request) -> Response:
        model = request.route.model
        is_ready = model.state.ready and not self._app.is_draining
        return _json({"name": model.name, "ready": is_ready}, 200 if is_ready else 503)

    def index(self, request: Request) -> Response:
        wants_ready = bool(request.body) and predict.decode(_decode_index, request.body).ready
        rows = []
        for model in self._served:
            state = model.state
            if state.ready or not wants_ready:
                row = {"name": model.name, "version": model.bundle.version}
                rows.append({**row, "state": "READY" if state.ready else "UNAVAILABLE", "reason": state.reason})
        return _json(rows)

    def load(self, request: Request) -> Awaitable[None]:
        return self._app.run(request, self._load(request))

    def language(self, request: Request) -> Awaitable[None]:
        return language.answer(self._app, request)

    async def _load(self, request: Request) -> Response:
        if request.body and predict.decode(_decode_load, request.body).parameters:
            raise Refusal(400, "a model is loaded from its own folder; nothing else can be asked for", "parameters")
        model = request.route.model
        try:
            bundle = await self._app.reload(model)
        except ServingError as error:
            raise Refusal(409, f"not loaded, {model.bundle.version} goes on: {error}", code="not_loaded") from error
        return _json({"name": model.name, "version": bundle.version})


class _Index(msgspec.Struct):
    ready: bool = False


class _Load(msgspec.Struct):
    parameters: dict[str, Any] | None = None


_decode_index = msgspec.json.Decoder(_Index).decode
_decode_load = msgspec.json.Decoder(_Load).decode


def version() -> str:
    """Of the package, where it is installed."""
    try:
        return importlib.metadata.version("yaml-trainer")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _json(content: object, status: int = 200, headers: bytes = b"") -> Response:
    return Response(status, msgspec.json.encode(content), JSON, headers)

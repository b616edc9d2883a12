"""Which path means what. Paths of served models are looked up in a table; odd spellings of them are taken apart."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any
from urllib.parse import unquote

from serving.errors import Mistake
from serving.front import language
from serving.front.http import Request, Response
from serving.front.refusal import Form, Refusal
from serving.front.served import Served, in_path

Answer = Callable[[Request], "Response | Awaitable[None]"]
"""Answers at once, or as a coroutine that responds itself."""


class Guard(Enum):
    """Who may ask."""

    OPEN = "open"
    """Everybody: probes, Prometheus, documentation."""
    CLIENT = "client"
    """Whoever has a key, where keys are set."""
    ADMIN = "admin"


@dataclass(frozen=True)
class Route:
    """One path."""

    answers: Mapping[bytes, Answer]
    """By method; HEAD goes with GET."""
    guard: Guard
    form: Form
    model: Any = None
    needs_body: bool = False
    check: Callable[[Request], None] | None = None
    """Looks at the headers before the body is read; raises Refusal."""


@dataclass(frozen=True)
class Endpoints:
    """The handlers of all routes that have a model in them, and the checks of their headers."""

    predict: Answer
    infer: Answer
    metadata: Answer
    model_ready: Answer
    load: Answer
    language: Answer
    check_predict: Callable[[Request], None]
    check_infer: Callable[[Request], None]


class Routes:
    """The table."""

    def __init__(self, fixed: Mapping[bytes, Route], endpoints: Endpoints, served: Served) -> None:
        self._fixed, self._endpoints, self._served = dict(fixed), endpoints, served
        self._table: dict[bytes, Route] = dict(fixed)
        self._aliases: dict[bytes, bytes] = {}

    def rebuild(self) -> None:
        """Enter the paths of all models that are served."""
        self._table = dict(self._fixed)
        for model in self._served:
            for path in _paths_of(model.name):
                with contextlib.suppress(Refusal):  # a language model has not all of them
                    self._table[path] = self.find(path)
        if self._served.predictors:
            self._table[b"/predict"] = self._predict(self._served.predictors[0])

    def alias(self, aliases: Mapping[bytes, bytes], names: Iterable[str]) -> None:
        """Answer each new path like an old one. Raises Mistake where there is none.

        Args:
            names: of the models that will be served.
        """
        known = {*self._fixed, b"/predict", *(path for name in names for path in _paths_of(name))}
        for new, old in aliases.items():
            if old not in known:
                raise Mistake(f"--alias {new.decode()}={old.decode()}: there is no path {old.decode()}")
        self._aliases = dict(aliases)

    def find(self, path: bytes) -> Route:
        """The route of a path, percent-encoded as sent. Raises Refusal 404."""
        route = self._table.get(path)
        if route is not None:
            return route
        if path in self._aliases:
            return self.find(self._aliases[path])
        if path.startswith((b"http://", b"https://")):  # as to a proxy
            return self.find(b"/" + path.split(b"/", 3)[3] if path.count(b"/") > 2 else b"/")
        try:
            parts = [unquote(part.decode("ascii"), errors="strict") for part in path.split(b"/")[1:]]
        except UnicodeDecodeError as error:
            raise Refusal(404, "no such path") from error
        return self._take_apart(parts)

    def _take_apart(self, parts: list[str]) -> Route:
        match parts:
            case ["predict"]:
                raise Refusal(404, "no model here takes /predict; see /docs")
            case ["models", name, "predict"]:
                return self._predict(self._predictor(name))
            case ["v1", *_] if self._served.language and (method := language.method("/" + "/".join(parts))):
                answers = {method: self._endpoints.language}
                return Route(answers, Guard.CLIENT, Form.OPENAI, needs_body=method == b"POST")
            case ["v2", "models", name, *rest]:
                return self._open_inference(name, rest)
            case ["v2", "repository", "models", name, "load"]:
                return Route({b"POST": self._endpoints.load}, Guard.ADMIN, Form.OPEN_INFERENCE, self._model(name))
        raise Refusal(404, "no such path; /docs lists those there are")

    def _predict(self, model: Any) -> Route:
        found = self._endpoints
        return Route({b"POST": found.predict}, Guard.CLIENT, Form.OWN, model, True, found.check_predict)

    def _open_inference(self, name: str, rest: list[str]) -> Route:
        model = self._model(name)
        match rest:
            case ["versions", version, *rest]:
                if version != model.bundle.version:
                    raise Refusal(404, f"{name} has no version {version!r}; it is at {model.bundle.version}")
        found, v2 = self._endpoints, Form.OPEN_INFERENCE
        match rest:
            case []:
                return Route({b"GET": found.metadata}, Guard.CLIENT, v2, model)
            case ["ready"]:
                return Route({b"GET": found.model_ready}, Guard.OPEN, v2, model)
            case ["infer"]:
                return Route({b"POST": found.infer}, Guard.CLIENT, v2, self._predictor(name), True, found.check_infer)
        raise Refusal(404, "no such path; /docs lists those there are")

    def _predictor(self, name: str) -> Any:
        model = self._model(name)
        if model not in self._served.predictors:
            raise Refusal(404, f"{name!r} is a language model: ask /v1/chat/completions")
        return model

    def _model(self, name: str) -> Any:
        model = self._served.models.get(name)
        if model is None:
            known = ", ".join(self._served.models)
            raise Refusal(404, f"unknown model {name[:100]!r}; served here: {known}", code="unknown_model")
        return model


def _paths_of(name: str) -> list[bytes]:
    segment = in_path(name).encode()
    forms = (b"/models/%b/predict", b"/v2/models/%b", b"/v2/models/%b/ready", b"/v2/models/%b/infer")
    return [form % segment for form in forms]

"""The models that are served, by name, and what the front knows of each version: how to parse, how to render."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import msgspec

from serving import inputs, outputs
from serving.bundle import Bundle
from serving.front.metrics import Metrics

LANGUAGE_RUNTIME = "transformers"


class State(Protocol):
    """How a model is."""

    @property
    def ready(self) -> bool: ...
    @property
    def reason(self) -> str: ...
    @property
    def workers_up(self) -> int: ...
    @property
    def workers_wanted(self) -> int: ...
    @property
    def queue_length(self) -> int: ...
    @property
    def outstanding(self) -> int: ...
    @property
    def restarts(self) -> int: ...


class Model(Protocol):
    """What a served model of any kind has; `serving.workers.model.ServedModel` adds `predict`."""

    name: str
    path: Path

    @property
    def bundle(self) -> Bundle: ...
    @property
    def state(self) -> State: ...
    async def reload(self, path: Path | None = None) -> Bundle: ...
    async def close(self, drain: float) -> None: ...


class Codec:
    """One version of a model, as the front needs it."""

    def __init__(self, name: str, bundle: Bundle, metrics: Metrics) -> None:
        self.name, self.bundle = name, bundle
        self.input = inputs.load(bundle.preprocessing, bundle.signature)
        self.output = outputs.load(bundle.postprocessing, bundle.signature)
        self.takes_pictures = bundle.preprocessing.get("kind") == "picture"
        self.has_labels = bundle.postprocessing.get("kind") == "classification"
        self.metrics = metrics.of(name, bundle.version)
        encoded = msgspec.json.encode({"model": name, "version": bundle.version})
        self.answer_head = encoded[:-1] + b',"predictions":'
        self.headers = b"x-model-version: %b\r\n" % bundle.version.encode()


class Served:
    """All models, in the order of the command line."""

    def __init__(self, metrics: Metrics) -> None:
        self.models: dict[str, Any] = {}
        self._metrics = metrics
        self._codecs: dict[str, Codec] = {}
        self._known: dict[str, Bundle] = {}

    def add(self, model: Model) -> None:
        self.models[model.name] = model

    def __iter__(self) -> Iterator[Any]:
        return iter(self.models.values())

    def codec(self, model: Any) -> Codec:
        """Of the version that would answer now."""
        bundle = model.bundle
        codec = self._codecs.get(model.name)
        if codec is None or codec.bundle is not bundle:
            codec = self._codecs[model.name] = Codec(model.name, bundle, self._metrics)
        return codec

    @property
    def predictors(self) -> list[Any]:
        """The models that are no language models."""
        return [model for model in self if not is_language(model.bundle)]

    @property
    def language(self) -> dict[str, Any]:
        """The language models by name."""
        return {model.name: model for model in self if is_language(model.bundle)}

    def not_ready(self) -> str:
        """Why not all models take requests; empty when they do."""
        return "; ".join(model.state.reason or model.name for model in self if not model.state.ready)


def is_language(bundle: Bundle) -> bool:
    return bundle.program.runtime == LANGUAGE_RUNTIME


def in_path(name: str) -> str:
    """A model's name as a segment of a path."""
    return quote(name, safe="")

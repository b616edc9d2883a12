"""The OpenAPI document, made from the signatures of the bundles that are served."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serving.front import openapi_v2
from serving.front.hello import golden
from serving.front.predict import MOST_TOP
from serving.front.schemas import (
    OWN_ERROR,
    Json,
    answers,
    closed,
    operation,
    parameter,
    reference,
)
from serving.front.served import Codec, in_path, is_language

if TYPE_CHECKING:
    from serving.front.app import App
    from serving.front.served import Served

PROBES = "probes"
LARGEST_EXAMPLE = 20_000
"""Characters of an example request; a larger one is left out."""


def document(served: Served, app: App) -> Json:
    """OpenAPI 3.1. `served` may be empty while the server starts."""
    paths: Json = dict(_probes())
    schemas: Json = {"Error": OWN_ERROR, **openapi_v2.SCHEMAS}
    paths |= openapi_v2.server_paths(served)
    for position, model in enumerate(served):
        if is_language(model.bundle):
            continue
        codec = served.codec(model)
        schemas |= _schemas(codec, position)
        one = _predict(codec, position, app.rules.most_instances)
        if model is served.predictors[0]:
            paths["/predict"] = {"post": {**one, "operationId": "predict"}}
        paths[f"/models/{in_path(model.name)}/predict"] = {"post": {**one, "operationId": f"predict_{position}"}}
        paths |= openapi_v2.model_paths(codec, position, app.rules.most_instances)
    if served.language:
        from serving.language import routes

        paths |= routes.paths(served.language)
    found: Json = {
        "openapi": "3.1.0",
        "info": {"title": ", ".join(served.models) or "serving", "version": _version(served), "description": _ABOUT},
        "tags": [{"name": name} for name in _tags(paths)],
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if app.access.has_keys:
        found["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
        _secure(paths)
    return found


_ABOUT = (
    "Predictions of exported training runs. Every answer has X-Request-Id; "
    "503 and 429 say in Retry-After when to try again."
)


def _version(served: Served) -> str:
    return ".".join(model.bundle.version for model in served) or "0"


def _tags(paths: Json) -> list[str]:
    """In the order in which a reader wants them: predictions, probes, and another protocol's form of both."""
    last = (PROBES, openapi_v2.TAG)
    found = dict.fromkeys(tag for methods in paths.values() for one in methods.values() for tag in one["tags"])
    return [*(tag for tag in found if tag not in last), *(tag for tag in last if tag in found)]


def _secure(paths: Json) -> None:
    for methods in paths.values():
        for one in methods.values():
            if not one.pop("x-open", False):
                one["security"] = [{"bearer": []}, {"header": []}]


def _probes() -> Json:
    live = closed({"status": {"const": "live"}})
    model = closed({"name": {"type": "string"}, "version": {"type": "string"}})
    ready = closed({"status": {"const": "ready"}, "models": {"type": "array", "items": model}})
    not_ready = closed({"status": {"const": "not ready"}, "reason": {"type": "string"}})
    probe: Json = {"tags": [PROBES], "x-open": True}
    return {
        "/health": {"get": {**operation("health", "Lives", {"200": ("It does.", live)}), **probe}},
        "/ready": {
            "get": {
                **operation("ready", "Takes requests", {"200": ("It does.", ready), "503": ("Not now.", not_ready)}),
                **probe,
            }
        },
        "/metrics": {
            "get": {
                "operationId": "metrics",
                "summary": "Prometheus' metrics",
                "responses": {"200": {"description": "Text format.", "content": {"text/plain": {}}}},
                **probe,
            }
        },
    }


def _part(position: int, what: str) -> str:
    """Name of a model's schema: a model's own name may hold what a component's may not."""
    return f"model{position}.{what}"


def _schemas(codec: Codec, position: int) -> Json:
    name = codec.name
    instances = {"type": "array", "items": reference(_part(position, "Instance")), "minItems": 1}
    top = {"type": ["integer", "null"], "minimum": 1, "maximum": MOST_TOP, "description": "keep the best few"}
    parameters = {"type": ["object", "null"], "properties": {"top": top}}
    answer = {
        "model": {"const": name},
        "version": {"type": "string"},
        "predictions": {"type": "array", "items": reference(_part(position, "Prediction"))},
    }
    return {
        _part(position, "Instance"): codec.input.schema(),
        _part(position, "Prediction"): codec.output.schema(),
        _part(position, "Request"): closed(
            {"instances": instances, "top": top, "parameters": parameters}, ["instances"]
        ),
        _part(position, "Answer"): closed(answer),
    }


def _predict(codec: Codec, position: int, most: int) -> Json:
    name, bundle = codec.name, codec.bundle
    request: Json = {"schema": reference(_part(position, "Request"))}
    example = {"instances": [golden(bundle)]}
    if len(str(example)) < LARGEST_EXAMPLE:
        request["examples"] = {"golden": {"summary": "a golden request", "value": example}}
    content: Json = {"application/json": request}
    if codec.takes_pictures:
        picture = {"schema": {"type": "string", "format": "binary", "minLength": 1}}
        content |= {"image/*": picture, "application/octet-stream": picture}
    found = operation(
        "predict",
        f"Predict with {name}",
        {"200": ("One prediction for each instance, in their order.", reference(_part(position, "Answer")))},
    )
    found["description"] = f"{bundle.task}, version {bundle.version}; at most {most} instances in one request."
    found["tags"] = [name]
    found["parameters"] = [parameter("X-Deadline-Ms"), parameter("X-Request-Id")]
    found["requestBody"] = {"required": True, "content": content}
    found["responses"] |= answers(reference("Error"), 400, 401, 411, 413, 415, 422, 429, 500, 503, 504)
    return found

"""OpenAI's endpoints in the server's OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from serving.language.requests import Chat, Completion

Json = dict[str, Any]

_REASONS = {
    "400": "The request is wrong, or longer than the model takes; the message says how.",
    "401": "A key is needed, or is not known here.",
    "404": "There is no such model.",
    "411": "A length is needed.",
    "413": "Too much in one request.",
    "415": "The body is compressed.",
    "429": "Too many requests from this client.",
    "500": "A defect of the server or the model.",
    "503": "Not now: overloaded, starting or ending; Retry-After says when to try again.",
    "504": "Not in time.",
}
_NULLABLE_TEXT = {"type": ["string", "null"]}
_ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _NULLABLE_TEXT,
                "code": _NULLABLE_TEXT,
            },
        }
    },
}
_USAGE: Json = {
    "type": "object",
    "properties": {name: {"type": "integer"} for name in ("prompt_tokens", "completion_tokens", "total_tokens")},
}
_MODEL: Json = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
    },
}


def paths(names: Iterable[str]) -> Json:
    """The paths, for models of these names."""
    there = list(names)
    listed = {"type": "object", "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": _MODEL}}}
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "enum": there}}
    return {
        "/v1/models": {"get": _operation("listModels", "The models", {"200": _json("All of them.", listed)})},
        "/v1/models/{model}": {
            "get": {
                **_operation("getModel", "One model", {"200": _json("It.", _MODEL), **_errors("404")}),
                "parameters": [name],
            }
        },
        "/v1/chat/completions": {"post": _generation("chat", "An answer in a conversation", Chat, "message", there)},
        "/v1/completions": {"post": _generation("complete", "How a text goes on", Completion, "text", there)},
    }


def _generation(name: str, summary: str, kind: Any, answer: str, models: list[str]) -> Json:
    body = _schema(kind)
    body["properties"]["model"] = {"type": "string", "enum": models}
    choice = {
        "type": "object",
        "required": ["index", answer, "finish_reason"],
        "properties": {"index": {"type": "integer"}, "finish_reason": {"enum": ["stop", "length"]}},
    }
    found = {
        "type": "object",
        "required": ["id", "object", "created", "model", "choices", "usage"],
        "properties": {"choices": {"type": "array", "items": choice}, "usage": _USAGE},
    }
    answered = _json("The answer; with `stream: true` as server-sent events.", found)
    answered["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    deadline = {
        "name": "X-Deadline-Ms",
        "in": "header",
        "required": False,
        "description": "Milliseconds in which the whole answer must be there; else 504.",
        "schema": {"type": "number", "exclusiveMinimum": 0},
    }
    return {
        **_operation(name, summary, {"200": answered, **_errors(*_REASONS)}),
        "parameters": [deadline],
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
    }


def _operation(name: str, summary: str, responses: Json) -> Json:
    return {"operationId": name, "summary": summary, "tags": ["language models"], "responses": responses}


def _errors(*statuses: str) -> Json:
    return {status: _json(_REASONS[status], _ERROR) for status in statuses}


def _json(text: str, schema: Json) -> Json:
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _schema(kind: Any) -> Json:
    """The schema of a request's body, whole, without references."""
    (found,), components = msgspec.json.schema_components([kind])

    def whole(part: Any) -> Any:
        if isinstance(part, list):
            return [whole(item) for item in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return whole(components[part["$ref"].rpartition("/")[2]])
        return {key: whole(value) for key, value in part.items() if key != "title"}

    result: Json = whole(found)
    return result

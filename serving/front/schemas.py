"""Pieces of an OpenAPI document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Json = dict[str, Any]

_TEXTS = {
    400: "The request is wrong; the message says where, and what was expected.",
    401: "A key is needed, or is not known here.",
    403: "Not for this client.",
    404: "Nothing is here.",
    409: "Not possible now; nothing has changed.",
    411: "A length is needed.",
    413: "Too much in one request.",
    415: "Another Content-Type is needed.",
    422: "The request is well-formed, but its picture is none.",
    429: "Too many requests from this client.",
    500: "A defect of the server or the model.",
    503: "Not now: overloaded, starting or ending.",
    504: "Not in time.",
}


def closed(properties: Json, required: Sequence[str] | None = None) -> Json:
    """An object with these properties and no others; all of them required where none is named."""
    needed = list(properties) if required is None else list(required)
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}


OWN_ERROR = closed(
    {
        "error": closed(
            {"code": {"type": "string"}, "message": {"type": "string"}, "field": {"type": "string"}},
            ["code", "message"],
        )
    }
)


def reference(name: str) -> Json:
    """To a schema of the document."""
    return {"$ref": f"#/components/schemas/{name}"}


def json_answer(text: str, schema: Json) -> Json:
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def operation(name: str, summary: str, found: dict[str, tuple[str, Json]]) -> Json:
    """An operation with its answers in JSON, by status."""
    responses = {status: json_answer(text, schema) for status, (text, schema) in found.items()}
    return {"operationId": name, "summary": summary, "responses": responses}


def answers(schema: Json, *statuses: int) -> Json:
    """Errors in one form."""
    return {str(status): json_answer(_TEXTS[status], schema) for status in statuses}


def parameter(name: str) -> Json:
    """A header that every prediction takes."""
    known: dict[str, Json] = {
        "X-Deadline-Ms": {
            "description": "Milliseconds in which the answer must be there; else 504.",
            "schema": {"type": "number", "exclusiveMinimum": 0},
        },
        "X-Request-Id": {
            "description": "Comes back in the answer, and stands in the log; replaced where it is an odd one.",
            "schema": {"type": "string"},
        },
    }
    return {"name": name, "in": "header", "required": False, **known[name]}

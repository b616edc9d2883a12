"""Why a request gets no answer, and how each protocol says so."""

from __future__ import annotations

import math
from enum import Enum

import msgspec

from serving.errors import BadInput
from serving.front.http import Response
from serving.workers.errors import DeadlineExceeded, Draining, Failed, Overloaded, TooMany, Unavailable, WorkerLost

CODES = {
    400: "bad_input",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "too_slow",
    411: "length_required",
    413: "too_large",
    415: "unsupported_media_type",
    417: "expectation_failed",
    422: "undecodable",
    429: "rate_limited",
    431: "too_large",
    499: "client_gone",
    500: "internal",
    501: "not_implemented",
    503: "unavailable",
    504: "deadline",
}
LONGEST_MESSAGE = 500


class Form(Enum):
    """How a protocol words an error."""

    OWN = "own"
    OPEN_INFERENCE = "v2"
    OPENAI = "openai"


class Refusal(Exception):
    """A request that is not answered as asked."""

    def __init__(self, status: int, message: str, field: str = "", code: str = "", headers: bytes = b"") -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.headers = status, message, field, headers
        self.code = code or CODES.get(status, "error")


def respond(refusal: Refusal, form: Form) -> Response:
    """The answer that tells it."""
    message = one_line(refusal.message)
    content: object
    if form is Form.OPEN_INFERENCE:
        content = {"error": f"{refusal.field}: {message}" if refusal.field else message}
    elif form is Form.OPENAI:
        kind = "server_error" if refusal.status >= 500 else "invalid_request_error"
        content = {
            "error": {"message": message, "type": kind, "param": refusal.field or None, "code": refusal.code},
        }
    else:
        error = {"code": refusal.code, "message": message}
        content = {"error": {**error, "field": refusal.field} if refusal.field else error}
    return Response(refusal.status, msgspec.json.encode(content), headers=refusal.headers)


def of_bad_input(error: BadInput) -> Refusal:
    """400, or 422 where the request is well-formed and its picture is none."""
    return Refusal(422 if error.is_undecodable else 400, error.message, error.field)


def of_serving(error: Exception) -> Refusal | None:
    """What the workers raise; None for what is a defect of the server."""
    if isinstance(error, BadInput):
        return of_bad_input(error)
    if isinstance(error, Unavailable):
        codes = {Overloaded: "overloaded", Draining: "draining", WorkerLost: "worker_lost"}
        return Refusal(503, str(error), code=codes.get(type(error), ""), headers=retry_after(error.retry_after))
    if isinstance(error, DeadlineExceeded):
        return Refusal(504, str(error))
    if isinstance(error, TooMany):
        return Refusal(413, str(error), "instances")
    if isinstance(error, Failed):
        return Refusal(500, str(error))
    return None


def retry_after(seconds: float) -> bytes:
    """The header's line: whole seconds, at least one."""
    return b"retry-after: %d\r\n" % max(1, math.ceil(seconds))


def one_line(text: str) -> str:
    """Without line ends and other control characters: it may quote what a client has sent."""
    text = " ".join(text.split())
    text = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    return text if len(text) <= LONGEST_MESSAGE else text[: LONGEST_MESSAGE - 3] + "..."

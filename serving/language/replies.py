"""Answers and errors in OpenAI's form."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from serving.errors import BadInput
from serving.language.messages import Part, TokenLogprob
from serving.workers.errors import DeadlineExceeded, TooMany, Unavailable

Endpoint = Literal["chat", "completion"]
DONE = b"data: [DONE]\n\n"
_PREFIXES = {"chat": "chatcmpl", "completion": "cmpl"}
_OBJECTS = {
    ("chat", False): "chat.completion",
    ("chat", True): "chat.completion.chunk",
    ("completion", False): "text_completion",
    ("completion", True): "text_completion",
}


@dataclass
class Choice:
    """One answer, as far as it has come."""

    index: int
    text: str = ""
    tokens: int = 0
    finish: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def add(self, part: Part) -> None:
        """What a step has brought."""
        self.text += part.text
        self.tokens += part.tokens
        self.finish = part.finish
        self.logprobs += part.logprobs


class Writer:
    """Writes the answers of one request."""

    def __init__(self, endpoint: Endpoint, model: str, version: str, tells_logprobs: bool) -> None:
        self.endpoint, self._model, self._version = endpoint, model, version
        self._tells_logprobs = tells_logprobs
        self._id = f"{_PREFIXES[endpoint]}-{secrets.token_hex(12)}"
        self._created = int(time.time())

    def whole(self, choices: Sequence[Choice], prompt_tokens: int) -> bytes:
        """The body of an answer that is not streamed."""
        made = [self._entry(choice, choice.text, choice.logprobs, choice.finish) for choice in choices]
        completion_tokens = sum(choice.tokens for choice in choices)
        return msgspec.json.encode(self._object(made, False) | {"usage": usage(prompt_tokens, completion_tokens)})

    def begin(self, index: int) -> bytes:
        """The first chunk of a chat's choice, which says who speaks."""
        entry = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return event(self._object([entry], True))

    def chunk(self, index: int, part: Part, offset: int) -> bytes:
        """What one step has brought; `offset`: characters of the answer so far."""
        choice = Choice(index, logprobs=part.logprobs)
        entry = self._entry(choice, part.text, part.logprobs, part.finish, is_delta=True, offset=offset)
        return event(self._object([entry], True))

    def usage(self, prompt_tokens: int, completion_tokens: int) -> bytes:
        """The last chunk, of `include_usage`."""
        return event(self._object([], True) | {"usage": usage(prompt_tokens, completion_tokens)})

    def _object(self, choices: list[dict[str, Any]], is_chunk: bool) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": _OBJECTS[self.endpoint, is_chunk],
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._version,
            "choices": choices,
        }

    def _entry(
        self,
        choice: Choice,
        text: str,
        logprobs: list[TokenLogprob],
        finish: str | None,
        is_delta: bool = False,
        offset: int = 0,
    ) -> dict[str, Any]:
        entry: dict[str, Any] = {"index": choice.index}
        if self.endpoint == "completion":
            entry["text"] = text
        elif is_delta:
            entry["delta"] = {"content": text} if text or finish is None else {}
        else:
            entry["message"] = {"role": "assistant", "content": text, "refusal": None}
        told = None
        if self._tells_logprobs:
            told = _of_chat(logprobs) if self.endpoint == "chat" else _of_completion(logprobs, offset)
        return entry | {"logprobs": told, "finish_reason": finish}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Numbers of tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def event(content: Any) -> bytes:
    """One event of a stream."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def models(names: Iterable[tuple[str, int]]) -> bytes:
    """The list of what a request may name as its model: (name, Unix time of its export)."""
    return msgspec.json.encode({"object": "list", "data": [model(name, created) for name, created in names]})


def model(name: str, created: int) -> dict[str, Any]:
    """One entry of that list."""
    return {"id": name, "object": "model", "created": created, "owned_by": "trainer"}


@dataclass(frozen=True)
class Problem:
    """Why a request has no answer."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None

    @property
    def content(self) -> dict[str, Any]:
        """In OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def problem(error: Exception) -> Problem:
    """What a client is told of an error; of one that is not foreseen, nothing but that it happened."""
    if isinstance(error, BadInput):
        return Problem(400, str(error), error.field or None, "bad_input")
    if isinstance(error, Unavailable):
        return Problem(503, str(error), code="unavailable", retry_after=max(1, math.ceil(error.retry_after)))
    if isinstance(error, DeadlineExceeded):
        return Problem(504, str(error), code="deadline_exceeded")
    if isinstance(error, TooMany):
        return Problem(413, str(error), code="too_many")
    return Problem(500, "internal error", code="internal_error")


def _of_chat(logprobs: list[TokenLogprob]) -> dict[str, Any]:
    content = [
        _token(entry.token, entry.logprob) | {"top_logprobs": [_token(*top) for top in entry.top]} for entry in logprobs
    ]
    return {"content": content, "refusal": None}


def _token(token: str, logprob: float) -> dict[str, Any]:
    # A token that is a part of a character has bytes that its text does not show.
    return {"token": token, "logprob": logprob, "bytes": None if "\ufffd" in token else list(token.encode())}


def _of_completion(logprobs: list[TokenLogprob], offset: int) -> dict[str, Any]:
    offsets = []
    for entry in logprobs:
        offsets.append(offset)
        offset += len(entry.token)
    return {
        "tokens": [entry.token for entry in logprobs],
        "token_logprobs": [entry.logprob for entry in logprobs],
        "top_logprobs": [dict(entry.top) for entry in logprobs] if any(entry.top for entry in logprobs) else None,
        "text_offset": offsets,
    }

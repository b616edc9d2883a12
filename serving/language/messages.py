"""What the front and an engine's process say to each other: MessagePack, each message behind its length."""

from __future__ import annotations

import struct
from typing import Any, Union

import msgspec

from serving.language.sampling import Sampling

LENGTH = struct.Struct("<I")


class Load(msgspec.Struct, tag="load"):
    """To a new engine: what it serves."""

    path: str
    version: str
    """What the front has read there; the files of another version are refused."""
    threads: int
    device: str
    max_rows: int
    cells: int | None
    """Tokens to keep memory for; None decides by the memory there is."""
    chunk: int


class Ready(msgspec.Struct, tag="ready"):
    """From an engine: it answers as in training, and is warm."""

    context: int
    """Tokens of prompt and answer together."""
    cells: int
    longest_token: int
    """Characters: a text of more than `context` times as many can't fit."""
    deviation: float
    count: int
    seconds: float


class Refused(msgspec.Struct, tag="refused"):
    """From an engine: why it can't serve."""

    reason: str
    is_mistake: bool


class Ask(msgspec.Struct, tag="ask"):
    """To an engine: one answer is wanted."""

    id: int
    """Rising: of two sequences, the one with the larger gives up its memory first."""
    prompt: str | list[int] | None
    messages: list[dict[str, str]] | None
    adapter: str | None
    sampling: Sampling
    """`max_tokens` 0: as many as fit."""


class Cancel(msgspec.Struct, tag="cancel"):
    """To an engine: nobody wants this answer any more."""

    id: int


class Denied(msgspec.Struct, tag="denied"):
    """From an engine: a request that can't be answered as it is."""

    id: int
    field: str
    message: str


class Begun(msgspec.Struct, tag="begun"):
    """From an engine: a request that will be answered."""

    id: int
    prompt_tokens: int


class TokenLogprob(msgspec.Struct, array_like=True):
    """One token of an answer."""

    token: str
    id: int
    logprob: float
    top: list[tuple[str, float]]


class Part(msgspec.Struct, array_like=True):
    """What one step has brought for one request."""

    id: int
    tokens: int
    """New ones."""
    text: str
    finish: str | None
    logprobs: list[TokenLogprob]


class Step(msgspec.Struct, tag="step"):
    """From an engine: what a step has brought."""

    parts: list[Part]
    running: int
    waiting: int


Message = Union[Load, Ready, Refused, Ask, Cancel, Denied, Begun, Step]  # noqa: UP007  # msgspec reads it at run time

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """A message for a stream socket."""
    content = _ENCODER.encode(message)
    return LENGTH.pack(len(content)) + content


def decode(content: bytes) -> Any:
    """The message behind a length. Raises msgspec.DecodeError."""
    return _DECODER.decode(content)

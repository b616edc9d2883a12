"""From conversations to ids and targets by a fast tokenizer, many at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recipes.language.conversations import BadRow, Conversation
from recipes.language.rendering import Renderer, Span
from trainer.errors import UserError


@dataclass(frozen=True)
class Document:
    """Tokens of one conversation or text."""

    ids: NDArray[np.int32]
    is_target: NDArray[np.bool_]


@dataclass(frozen=True)
class Encoder:
    """Conversations to documents."""

    documents: Callable[[list[Conversation], bool], list[Document | None]]
    """(conversations, skip): None for one that the chat template refuses, where such are to be skipped."""
    identity: str
    """Hash of the tokenizer and of the template."""


def encoder(tokenizer: Any, template: str | None, train_on: str, is_text: bool) -> Encoder:
    """How this tokenizer takes conversations (or plain texts).

    Raises UserError for a tokenizer without a template, or one that can't tell where its tokens stand in the text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"init_from: its tokenizer is a slow one ({type(tokenizer).__name__}); a tokenizer.json is needed"
        )
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    if is_text:
        digest.update(json.dumps([tokenizer.eos_token_id]).encode())
        return Encoder(lambda batch, skip: _texts(tokenizer, batch), digest.hexdigest())
    renderer = Renderer(tokenizer, template)
    digest.update(json.dumps([renderer.template, tokenizer.special_tokens_map], default=str).encode())

    def documents(batch: list[Conversation], skip: bool) -> list[Document | None]:
        return _chats(tokenizer, renderer, batch, train_on == "all", skip)

    return Encoder(documents, digest.hexdigest())


def _texts(tokenizer: Any, batch: Sequence[Conversation]) -> list[Document | None]:
    """Plain text: with the tokens that the tokenizer puts around it, and the one that ends a text."""
    encodings = _encode(tokenizer, [conversation.text or "" for conversation in batch], add_special_tokens=True)
    end = tokenizer.eos_token_id
    found: list[Document | None] = []
    for encoding in encodings:
        ids = encoding.ids
        if end is not None and (not ids or ids[-1] != end):
            ids = [*ids, end]
        found.append(Document(np.array(ids, np.int32), np.ones(len(ids), np.bool_)))
    return found


def _chats(
    tokenizer: Any, renderer: Renderer, batch: Sequence[Conversation], all_tokens: bool, skip: bool
) -> list[Document | None]:
    texts: list[str] = []
    spans: list[list[Span] | None] = []
    for conversation in batch:
        try:
            text, found = (renderer.text(conversation), []) if all_tokens else renderer.text_and_spans(conversation)
        except BadRow:
            if not skip:
                raise
            text, found = "", None
        texts.append(text)
        spans.append(found)
    documents: list[Document | None] = []
    for encoding, where in zip(_encode(tokenizer, texts, add_special_tokens=False), spans, strict=True):
        if where is None:
            documents.append(None)
            continue
        ids = np.array(encoding.ids, np.int32)
        is_target = np.ones(len(ids), np.bool_) if all_tokens else np.zeros(len(ids), np.bool_)
        for span in where:
            first, end = _tokens_of(encoding, span)
            is_target[first:end] = True
        documents.append(Document(ids, is_target))
    return documents


def _encode(tokenizer: Any, texts: list[str], add_special_tokens: bool) -> list[Any]:
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # some tokenizer.json files ask for either
    backend.no_padding()
    encodings: list[Any] = backend.encode_batch(texts, add_special_tokens=add_special_tokens)
    return encodings


def _tokens_of(encoding: Any, span: Span) -> tuple[int, int]:
    """First token, and the one behind the last, of those that hold a character of the span.

    A token that reaches over the edge belongs to it, as in transformers' `return_assistant_tokens_mask`.
    """
    start, end = span
    first = None
    while first is None and start < end:  # blanks that the tokenizer drops are in no token
        first = encoding.char_to_token(start)
        start += 1
    if first is None:
        return 0, 0
    last, behind = first, end
    while behind >= start:
        token = encoding.char_to_token(behind - 1)
        if token is not None:
            last = token
            break
        behind -= 1
    # A character of several bytes may be several tokens, of which the first was found.
    while last + 1 < len(encoding) and (chars := encoding.token_to_chars(last + 1)) is not None and chars[0] < end:
        last += 1
    return first, last + 1

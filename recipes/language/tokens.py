"""From conversations to tokens: made once, kept as memory maps, read by every process and every later run."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from recipes.language.cache import kept
from recipes.language.conversations import Conversation, Conversations
from recipes.language.encoding import Document, encoder
from trainer.errors import UserError

_VERSION = 1
"""Of what the cache holds; raise it when the same input gives other tokens."""
_BATCH = 512
"""Conversations that the tokenizer takes at once, on all its threads."""


@dataclass(frozen=True)
class TokenOptions:
    """How conversations become tokens."""

    max_length: int
    """Tokens of a document at most; plain text is cut into windows of this many."""
    train_on: Literal["assistant", "all"] = "assistant"
    """Whether the loss counts the assistant's tokens alone; plain text is learnt as a whole."""
    chat_template: str | None = None
    """Text of a Jinja template; None is the tokenizer's own."""
    too_long: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to a conversation that is longer: cut its end off, leave it out, or stop."""


@dataclass(frozen=True)
class Tokens:
    """Documents of tokens, one after the other, mapped into memory."""

    ids: NDArray[np.int32]
    """[tokens]"""
    is_target: NDArray[np.bool_]
    """[tokens]: whether the loss counts this token as one to be predicted; never so for a document's first."""
    offsets: NDArray[np.int64]
    """[documents + 1]: where each document begins."""
    source: NDArray[np.int64]
    """[documents]: index of the conversation; those left out are missing, windows of one text share it."""
    fingerprint: str
    """Hash of everything that the tokens depend on."""
    report: Mapping[str, int] = field(default_factory=dict)
    """`conversations`, `documents`, `tokens`, `targets`, `truncated`, `too_long` (left out), `no_target` (left out,
    nothing of the assistant is left), `refused` (left out, by the chat template)."""

    def __len__(self) -> int:
        return len(self.source)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[documents]"""
        return np.diff(self.offsets)

    def document(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Ids and targets of one document."""
        start, end = self.offsets[index], self.offsets[index + 1]
        return self.ids[start:end], self.is_target[start:end]


def tokenise(
    conversations: Conversations,
    tokenizer: Any,
    options: TokenOptions,
    cache: Path,
    say: Callable[[str], None] = lambda text: None,
    name: str = "data",
) -> Tokens:
    """Tokens of a split, from the cache where they are there. Several processes may ask at once; one makes them.

    Args:
        tokenizer: transformers' own, a fast one.
        cache: folder of what is computed once.
        say: gets one line, with what was cut off or left out.
        name: of the split, for that line.

    Raises:
        UserError: what the data or the chat template are to blame for.
        TrainerError: the cache can't be written.
    """
    if options.max_length < 2:
        raise UserError(f"recipe.max_length: is {options.max_length}; a document needs two tokens, to predict one")
    # Said before they are used, or each fork of a data worker would print advice.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    encode = encoder(tokenizer, options.chat_template, options.train_on, conversations.is_text)
    key = _key(conversations, encode.identity, options)
    started = time.perf_counter()

    def make(folder: Path) -> dict[str, Any]:
        return _write(folder, _documents(conversations, encode.documents, options))

    folder, about, made = kept(cache, f"tokens-{key[:32]}", make)
    tokens = _read(folder, key, about)
    say(_line(name, tokens, options, f"{time.perf_counter() - started:.1f} s" if made else "from the cache"))
    if not len(tokens):
        raise UserError(f"{name}: no conversation is left of {len(conversations):,}: {_left_out(tokens.report)}")
    return tokens


def _key(conversations: Conversations, encoder_identity: str, options: TokenOptions) -> str:
    import tokenizers
    import transformers

    parts = [
        _VERSION,
        conversations.fingerprint,
        encoder_identity,
        asdict(options),
        tokenizers.__version__,
        transformers.__version__,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass
class _Counts:
    conversations: int = 0
    documents: int = 0
    tokens: int = 0
    targets: int = 0
    truncated: int = 0
    too_long: int = 0
    no_target: int = 0
    refused: int = 0


def _documents(
    conversations: Conversations,
    encode: Callable[[list[Conversation], bool], list[Document | None]],
    options: TokenOptions,
) -> Iterator[tuple[int, Document, _Counts]]:
    """(conversation, document, counts so far) for each document that is kept."""
    counts = _Counts()
    for start in range(0, len(conversations), _BATCH):
        batch = [conversations[index] for index in range(start, min(start + _BATCH, len(conversations)))]
        for index, document in enumerate(encode(batch, conversations.skip_bad), start):
            counts.conversations += 1
            if document is None:
                counts.refused += 1
                continue
            pieces = (
                _windows(document, options.max_length)
                if conversations.is_text
                else _fitted(document, options, counts, conversations, index)
            )
            for piece in pieces:
                piece.is_target[:1] = False
                if not piece.is_target.any():
                    counts.no_target += 1
                    continue
                counts.documents += 1
                counts.tokens += len(piece.ids)
                counts.targets += int(piece.is_target.sum())
                yield index, piece, counts
    yield -1, Document(np.empty(0, np.int32), np.empty(0, np.bool_)), counts


def _windows(document: Document, max_length: int) -> Iterator[Document]:
    """Windows that begin with the last token of the one before, so that every token is predicted once."""
    for start in range(0, max(len(document.ids) - 1, 1), max_length - 1):
        yield Document(document.ids[start : start + max_length], document.is_target[start : start + max_length].copy())


def _fitted(
    document: Document, options: TokenOptions, counts: _Counts, conversations: Conversations, index: int
) -> list[Document]:
    if len(document.ids) <= options.max_length:
        return [document]
    if options.too_long == "error":
        raise UserError(
            f"{conversations[index].place}: has {len(document.ids):,} tokens, more than "
            f"recipe.max_length={options.max_length}; raise it, or set recipe.too_long to truncate or drop"
        )
    if options.too_long == "drop":
        counts.too_long += 1
        return []
    counts.truncated += 1
    return [Document(document.ids[: options.max_length], document.is_target[: options.max_length])]


def _write(folder: Path, documents: Iterator[tuple[int, Document, _Counts]]) -> dict[str, Any]:
    counts = _Counts()
    with ExitStack() as stack:
        ids, is_target, lengths, source = (
            stack.enter_context(_open(folder / f"{name}.bin")) for name in ("ids", "is_target", "lengths", "source")
        )
        for index, document, counts in documents:  # noqa: B007
            if index < 0:
                break
            ids.write(document.ids.astype("<i4").tobytes())
            is_target.write(document.is_target.tobytes())
            lengths.write(len(document.ids).to_bytes(8, "little"))
            source.write(index.to_bytes(8, "little"))
    return asdict(counts)


def _open(file: Path) -> BinaryIO:
    return file.open("wb", buffering=1 << 20)


def _read(folder: Path, key: str, about: Mapping[str, int]) -> Tokens:
    lengths = _map(folder / "lengths.bin", "<i8")
    return Tokens(
        ids=_map(folder / "ids.bin", "<i4"),
        is_target=_map(folder / "is_target.bin", "?"),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        source=_map(folder / "source.bin", "<i8"),
        fingerprint=key,
        report=about,
    )


def _map(file: Path, kind: str) -> NDArray[Any]:
    if not file.stat().st_size:
        return np.empty(0, kind)
    return np.memmap(file, kind, mode="r")


def _line(name: str, tokens: Tokens, options: TokenOptions, how: str) -> str:
    report = tokens.report
    share = report["targets"] / max(report["tokens"], 1)
    parts = [f"{report['documents']:,} documents", f"{report['tokens']:,} tokens, {share:.0%} of them targets"]
    if report["truncated"]:
        parts.append(f"{report['truncated']:,} truncated to {options.max_length:,}")
    left_out = _left_out(report)
    return f"{name}: {', '.join(parts)}{f', left out: {left_out}' if left_out else ''} ({how})"


def _left_out(report: Mapping[str, int]) -> str:
    reasons = {
        "too_long": "longer than recipe.max_length",
        "no_target": "without a token of the assistant within recipe.max_length",
        "refused": "refused by the chat template",
    }
    return ", ".join(f"{report[key]:,} {text}" for key, text in reasons.items() if report[key])

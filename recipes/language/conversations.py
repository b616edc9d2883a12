"""Conversations as every language recipe sees them, and the splits that a data set gives."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.task import Pool

Role = Literal["system", "user", "assistant", "tool"]
Indices = NDArray[np.int64]


class BadRow(UserError):
    """A row that is no conversation; `data.bad_rows: skip` leaves it out."""


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns, or plain text where `text` is set."""

    messages: tuple[Message, ...]
    place: str
    """Where it stands, for messages to the user: `file.jsonl:17`."""
    text: str | None = None

    def digest(self) -> int:
        """64-bit hash of what is said, whatever file and format it came from; never 0."""
        # Lengths keep ("ab", "c") and ("a", "bc") apart.
        parts = [self.text] if self.text is not None else [part for m in self.messages for part in (m.role, m.content)]
        hashed = hashlib.blake2b(digest_size=8)
        for part in parts:
            data = part.encode("utf-8", "surrogatepass")
            hashed.update(b"%d:" % len(data))
            hashed.update(data)
        return int.from_bytes(hashed.digest(), "little") or 1


class Rows(Protocol):
    """Rows of files, read when they are asked for; quick when asked for in order."""

    fingerprint: str
    """Hash of the contents of the files."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises BadRow for one that can't be read."""
        ...

    def place(self, index: int) -> str:
        """File and row (or line) for messages: `file.jsonl:17`."""
        ...


class Format(Protocol):
    """What the keys of a row mean."""

    @property
    def name(self) -> str: ...

    def conversation(self, row: Mapping[str, Any], place: str) -> Conversation:
        """Raises BadRow, with the place, for a row that is not of this format."""
        ...


@dataclass(frozen=True)
class Conversations:
    """One split: some rows of some files, read when they are asked for."""

    rows: Rows
    format: Format
    indices: Indices
    """Rows that belong to the split, in their own order."""
    fingerprint: str
    """Hash of everything that the conversations depend on."""
    skip_bad: bool = False
    """Whether rows that turn out to be bad later (the chat template refuses them) are left out."""

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Conversation:
        row = int(self.indices[index])
        return self.format.conversation(self.rows[row], self.rows.place(row))

    @property
    def is_text(self) -> bool:
        """Whether these are plain texts without turns."""
        return self.format.name == "text"


@dataclass(frozen=True)
class ConversationSplits:
    """What `recipes/data/instructions.py` builds."""

    fingerprint: str
    splits: Mapping[str, Conversations]
    notes: Sequence[str]
    """Lines to say: formats, sizes, duplicates, overlap."""
    counts: Mapping[str, Mapping[str, int]]
    """Split -> `rows`, `left_out`, `duplicates` (of a row before it in the split), `overlap` (of a row in `train`, for
    the other splits)."""
    digests: Mapping[str, NDArray[np.uint64]] = field(default_factory=dict)
    """Split -> hash of what each of its conversations says."""

    def split(self, name: str) -> Conversations | None:
        """The split `train`, `val` or `test`; None where there is none."""
        return self.splits.get(name)

    def pool(self, group_by: str | None) -> Pool:
        """`group_by` is a column; conversations that say the same stay together. See `trainer.task.Divisible`."""
        from recipes.language.dividing import column, pooled

        both, digests = pooled(self)
        return Pool(len(both), keys=column(both, group_by) if group_by is not None else None, same=digests)

    def divide(self, train: Indices, val: Indices | None) -> ConversationSplits:
        from recipes.language.dividing import divided

        return divided(self, train, val)

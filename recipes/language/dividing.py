"""Cutting conversations anew into `train` and `val`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recipes.language.conversations import Conversations, ConversationSplits, Indices
from recipes.language.examine import Digests, first_of_each
from recipes.language.sources import JoinedRows
from trainer.errors import UserError


def pooled(splits: ConversationSplits) -> tuple[Conversations, Digests]:
    """What `train` and `val` hold together, in the order of the files, and the hash of what each says.

    Raises UserError where the two are of different formats.
    """
    train, val = splits.splits["train"], splits.split("val")
    if val is None:
        return train, splits.digests["train"]
    if train.format != val.format:
        raise UserError(
            f"holdout.method: train and val can't be pooled: they are of different formats ({train.format.name}, "
            f"{val.format.name}, or other columns)"
        )
    digests = np.concatenate([splits.digests["train"], splits.digests["val"]])
    if train.rows is val.rows:  # one was held out of the other: back into their order
        indices = np.concatenate([train.indices, val.indices])
        order = np.argsort(indices, kind="stable")
        return _some(replace(train, indices=indices), order), digests[order]
    rows = JoinedRows([train.rows, val.rows])
    indices = np.concatenate([train.indices, val.indices + len(train.rows)])
    fingerprint = hashlib.sha256(f"{train.fingerprint}{val.fingerprint}".encode()).hexdigest()
    return Conversations(rows, train.format, indices, fingerprint, train.skip_bad), digests


def divided(splits: ConversationSplits, train: Indices, val: Indices | None) -> ConversationSplits:
    """The same conversations with these of the pool as `train` and `val`."""
    both, digests = pooled(splits)
    parts = {"train": train} if val is None else {"train": train, "val": val}
    found = {name: _some(both, part) for name, part in parts.items()}
    said = {name: digests[part] for name, part in parts.items()}
    if (test := splits.split("test")) is not None:
        found["test"], said["test"] = test, splits.digests["test"]
    counts = {
        name: {
            "rows": len(part),
            "left_out": 0,
            "duplicates": int((~first_of_each(part)).sum()),
            "overlap": 0 if name == "train" else int(np.isin(part, said["train"]).sum()),
        }
        for name, part in said.items()
    }
    together = hashlib.sha256("".join(f"{n}{c.fingerprint}" for n, c in sorted(found.items())).encode()).hexdigest()
    sizes = ", ".join(f"{name} {len(part):,}" for name, part in said.items())
    return ConversationSplits(together, found, [*splits.notes, f"data: cut anew: {sizes}"], counts, said)


def column(conversations: Conversations, name: str) -> NDArray[Any]:
    """What the column `name` says of each conversation: numbers where all of them are, else text.

    Raises UserError for the first row without it.
    """
    values = []
    for row in conversations.indices.tolist():
        found = conversations.rows[row]
        if found.get(name) is None:
            raise UserError(
                f"holdout.group_by: {conversations.rows.place(row)} has no column {name!r}; "
                f"it has: {', '.join(map(str, found))}"
            )
        values.append(found[name])
    if all(isinstance(value, int | float) for value in values):
        return np.array(values)
    return np.array([value if isinstance(value, str) else json.dumps(value, default=str) for value in values])


def _some(conversations: Conversations, chosen: Indices) -> Conversations:
    indices = conversations.indices[chosen]
    digest = hashlib.sha256(f"{conversations.rows.fingerprint}\0{conversations.fingerprint}\0".encode())
    digest.update(indices.astype("<i8").tobytes())
    return replace(conversations, indices=indices, fingerprint=digest.hexdigest())

"""One pass over all rows: which are conversations, which say the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recipes.language.cache import cache_folder, kept
from recipes.language.conversations import BadRow, Conversations, Format, Indices, Rows

Digests = NDArray[np.uint64]
_VERSION = 1


def examine(conversations: Conversations) -> Digests:
    """The hash of what each conversation says, in their order; 0 for a bad row. Kept in the cache.

    Raises BadRow for the first bad row, unless they are to be skipped.
    """

    def make(folder: Path) -> dict[str, Any]:
        digests = np.zeros(len(conversations), np.uint64)
        for index in range(len(conversations)):
            try:
                digests[index] = conversations[index].digest()
            except BadRow:
                if not conversations.skip_bad:
                    raise
        np.save(folder / "digests.npy", digests)
        return {}

    identity = f"{_VERSION}\0{conversations.fingerprint}"
    folder, _, _ = kept(cache_folder(), "rows-" + hashlib.sha256(identity.encode()).hexdigest()[:32], make)
    found: Digests = np.load(folder / "digests.npy")
    return found


def choose(rows: Rows, layout: Format, about: str, skip_bad: bool, indices: Indices | None = None) -> Conversations:
    """Some rows, or all; `about` says what the format depends on.

    The fingerprint is that of the contents, the format and the choice.
    """
    digest = hashlib.sha256(f"{rows.fingerprint}\0{about}\0{skip_bad}\0".encode())
    digest.update(b"all" if indices is None else indices.astype("<i8").tobytes())
    chosen = np.arange(len(rows)) if indices is None else indices
    return Conversations(rows, layout, chosen, digest.hexdigest(), skip_bad)


def first_of_each(digests: Digests) -> NDArray[np.bool_]:
    """True where no conversation before says the same."""
    first = np.zeros(len(digests), bool)
    first[np.unique(digests, return_index=True)[1]] = True
    return first


def cut(digests: Digests, fractions: Sequence[float], seed: int) -> list[NDArray[np.bool_]]:
    """Masks of the rest and of a part for each fraction: what says the same lies on one side.

    Fractions are of the different conversations; the rest keeps at least one. What is drawn depends on what is said
    and on `seed`, not on the order of the rows.
    """
    unique, group = np.unique(digests, return_inverse=True)
    # RandomState's streams are frozen by numpy's compatibility policy; those of Generator may change.
    order = np.random.RandomState(seed).permutation(len(unique))
    part_of = np.zeros(len(unique), np.int64)
    start = 0
    for number, fraction in enumerate(fractions, 1):
        count = max(1, round(fraction * len(unique))) if fraction > 0 else 0
        count = min(count, len(unique) - 1 - start)
        part_of[order[start : start + count]] = number
        start += count
    return [part_of[group] == number for number in range(len(fractions) + 1)]

"""Cutting a labelled data set into splits that never change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def stratified_split(labels: NDArray[np.integer], fractions: Sequence[float], seed: int) -> list[Indices]:
    """Indices of the rest and of a part for each fraction, every class in the same proportions.

    Each class keeps at least one sample in the rest. Returns `[rest, part, part, ...]`, each sorted.
    """
    # RandomState's streams are frozen by numpy's compatibility policy; those of Generator may change.
    random = np.random.RandomState(seed)
    parts: list[list[Indices]] = [[] for _ in range(len(fractions) + 1)]
    order = np.argsort(labels, kind="stable")
    class_starts = np.flatnonzero(np.diff(labels[order])) + 1
    for members in np.split(order, class_starts):
        members = random.permutation(members)
        start = 0
        for part, fraction in zip(parts[1:], fractions, strict=True):
            count = max(0, min(round(fraction * len(members)), len(members) - 1 - start))
            part.append(members[start : start + count])
            start += count
        parts[0].append(members[start:])
    return [np.sort(np.concatenate(part)).astype(np.int64) for part in parts]

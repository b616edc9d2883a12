"""Which documents make one sample: whole documents packed into a budget of tokens, or rows of near-equal length.

A pure function of (lengths, budget, layout, seed), so that every rank and every resumed run has the same samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Layout = Literal["packed", "padded"]
Lengths = NDArray[np.int64]


@dataclass(frozen=True)
class Groups:
    """Every document, in exactly one group."""

    members: NDArray[np.int64]
    """[documents]: documents of the first group, then those of the second, and so on."""
    starts: NDArray[np.int64]
    """[groups + 1]: where each group begins in `members`."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def documents(self, group: int) -> NDArray[np.int64]:
        """Documents of one group."""
        return self.members[self.starts[group] : self.starts[group + 1]]

    def largest(self, lengths: Lengths) -> Lengths:
        """[groups]: length of the longest document of each."""
        if not len(self):
            return np.empty(0, np.int64)
        return np.maximum.reduceat(lengths[self.members], self.starts[:-1])


def group(lengths: Lengths, budget: int, layout: Layout, seed: int) -> Groups:
    """Groups of documents: `packed` holds at most `budget` tokens, `padded` at most that many with its padding.

    Args:
        lengths: [documents] tokens of each, 1 or more. In `packed`, none is longer than `budget`; in `padded`, one
            that is makes a group of its own.
        seed: decides which of equally long documents come together.
    """
    assert len(lengths) == 0 or lengths.min() >= 1
    assert layout == "padded" or len(lengths) == 0 or lengths.max() <= budget
    # Longest first, those of equal length in the order that the seed draws.
    drawn = np.random.Generator(np.random.PCG64(seed)).permutation(len(lengths))
    order = drawn[np.argsort(-lengths[drawn], kind="stable")]
    if layout == "padded":
        return Groups(order, _rows(lengths[order], budget))
    return _pack(lengths[order], order, budget)


def padded_size(groups: Groups, lengths: Lengths) -> int:
    """Tokens with padding, where each group is a batch of rows."""
    return int((groups.largest(lengths) * np.diff(groups.starts)).sum())


def _rows(descending: Lengths, budget: int) -> NDArray[np.int64]:
    starts, at = [0], 0
    while at < len(descending):
        at = min(at + max(1, budget // int(descending[at])), len(descending))
        starts.append(at)
    return np.array(starts, np.int64)


def _pack(descending: Lengths, order: NDArray[np.int64], budget: int) -> Groups:
    """Best fit, longest first: each document goes where it leaves the least room.

    At most 11/9 of the fewest groups possible, plus one (Johnson 1973); groups are found by the room that they have
    left, so that a million documents take seconds.
    """
    group_of = np.empty(len(order), np.int64)
    num_groups = 0
    with_room: list[list[int]] = [[] for _ in range(budget + 1)]  # room -> groups that have this much left
    rooms = 0  # bit r is set where with_room[r] holds a group
    for start, end, length in _runs(descending):
        at = start
        while at < end:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                chosen = with_room[room].pop()
                if not with_room[room]:
                    rooms ^= 1 << room
            else:
                room, chosen = budget, num_groups
                num_groups += 1
            # What is left is the least room again: documents of this length go on into the same group.
            taken = min(room // length, end - at)
            group_of[at : at + taken] = chosen
            at += taken
            left = room - taken * length
            if left:
                with_room[left].append(chosen)
                rooms |= 1 << left
    by_group = np.argsort(group_of, kind="stable")
    counts = np.bincount(group_of, minlength=num_groups)
    return Groups(order[by_group], np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


def _runs(descending: Lengths) -> Iterator[tuple[int, int, int]]:
    """(start, end, length) of each run of equal lengths."""
    if not len(descending):
        return
    edges = np.flatnonzero(np.diff(descending)) + 1
    for start, end in zip([0, *edges.tolist()], [*edges.tolist(), len(descending)], strict=True):
        yield start, end, int(descending[start])

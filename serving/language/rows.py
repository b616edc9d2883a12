"""Keys and values of sequences of different lengths in one batch: a row each, padded at the end to the longest.

transformers' caches hold one length for all rows. Here each row has its own, so that a sequence joins and leaves
between two tokens without moving the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

Pair = tuple[Tensor | None, Tensor | None]
GRAIN = 64
"""Rows grow by this many tokens."""


@dataclass
class _Place:
    """Where the next token of each row goes; shared by all layers."""

    rows: Tensor
    """0 .. count-1."""
    positions: Tensor
    """[count], the index of the next token in each row."""
    longest: int = 0
    """Tokens of the longest row, with the next one."""


class _Layer(CacheLayerMixin):
    """Keys and values [rows, heads, length, dim] of one layer; those behind a row's end are finite and masked."""

    def __init__(self, place: _Place) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.place = place

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token for each row; the keys and values that the rows may look at."""
        place = self.place
        assert self.keys is not None and self.values is not None
        self.keys[place.rows, :, place.positions] = key_states[:, :, 0]
        self.values[place.rows, :, place.positions] = value_states[:, :, 0]
        count = len(place.rows)
        return self.keys[:count, :, : place.longest], self.values[:count, :, : place.longest]

    def resize(self, rows: int, length: int, like: tuple[Tensor, Tensor], keep: tuple[int, int]) -> None:
        """Buffers of this size with what is in the first `keep` rows and positions of the old ones."""
        count, longest = keep
        made = []
        for old, example in ((self.keys, like[0]), (self.values, like[1])):
            new = example.new_zeros((rows, example.shape[1], length, example.shape[3]))
            if old is not None and count:
                new[:count, :, :longest] = old[:count, :, :longest]
            made.append(new)
        self.keys, self.values = made
        self.is_initialized = True

    def put(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Fill the beginning of a row."""
        assert self.keys is not None and self.values is not None
        self.keys[row, :, : keys.shape[1]] = keys
        self.values[row, :, : values.shape[1]] = values

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a row over another."""
        for buffer in (self.keys, self.values):
            assert buffer is not None
            buffer[target, :, :length] = buffer[source, :, :length]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Rows are made by `resize`."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what is looked at; the mask itself is given with each call of the model."""
        return self.place.longest, 0

    def get_seq_length(self) -> int:
        """Tokens of the longest row."""
        return max(self.place.longest - 1, 0)

    def get_max_length(self) -> int:
        """No bound."""
        return -1


class Rows:
    """The rows of a batch, in order. The last takes the place of one that leaves."""

    def __init__(self, device: torch.device, is_additive: bool = False) -> None:
        """`is_additive`: the model's attention wants a mask that is added, rather than one of truth values."""
        self.lengths: list[int] = []
        self.cache: Cache | None = None
        self._device, self._is_additive = device, is_additive
        self._place = _Place(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
        self._size = (0, 0)

    @property
    def cells(self) -> int:
        """Tokens there is memory for now."""
        return self._size[0] * self._size[1]

    def cells_for(self, count: int, longest: int) -> int:
        """Tokens there would be memory for with `count` rows and `longest` tokens in the longest of them."""
        rows, length = _rounded(count, longest)
        return self.cells if self._holds(rows, length) else rows * length

    def join(self, filled: DynamicCache, length: int) -> None:
        """Add a row with the keys and values of a sequence of `length` tokens that was read alone."""
        if self.cache is None:
            self.cache = Cache(layers=[_Layer(self._place) for _ in filled.layers])
        like = keys_and_values(filled)
        self._fit(len(self.lengths) + 1, max([length, *self.lengths]) + 1, like)
        row = len(self.lengths)
        for layer, (keys, values) in zip(self._layers(), like, strict=True):
            if keys is not None and values is not None:  # a layer that looks at another one's has none
                layer.put(row, keys[0], values[0])
        self.lengths.append(length)

    def leave(self, row: int) -> None:
        """Remove a row; the last one takes its number."""
        last = len(self.lengths) - 1
        if row != last:
            for layer in self._layers():
                if layer.keys is not None:
                    layer.move(last, row, self.lengths[last])
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        if not self.lengths:
            self.cache, self._size = None, (0, 0)
            return
        wanted = _rounded(len(self.lengths), max(self.lengths) + 1)
        if self.cells > 2 * wanted[0] * wanted[1]:
            self._resize(wanted, None)

    def prepare(self) -> tuple[Tensor, Tensor]:
        """Make room for a token in each row: its positions [rows, 1] and the mask [rows, 1, 1, longest]."""
        longest = max(self.lengths) + 1
        self._fit(len(self.lengths), longest, None)
        positions = torch.tensor(self.lengths, device=self._device)
        self._place.rows = torch.arange(len(self.lengths), device=self._device)
        self._place.positions, self._place.longest = positions, longest
        seen = (torch.arange(longest, device=self._device)[None] <= positions[:, None])[:, None, None]
        if not self._is_additive:
            return positions[:, None], seen
        keys = next(layer.keys for layer in self._layers() if layer.keys is not None)
        least = torch.finfo(keys.dtype).min
        return positions[:, None], torch.zeros_like(seen, dtype=keys.dtype).masked_fill(~seen, least)

    def advance(self) -> None:
        """Each row has one token more: the model has written it."""
        self.lengths = [length + 1 for length in self.lengths]

    def _layers(self) -> list[_Layer]:
        assert self.cache is not None
        return self.cache.layers  # type: ignore[return-value]

    def _fit(self, count: int, longest: int, like: list[Pair] | None) -> None:
        size = _rounded(count, longest)
        if not self._holds(*size):
            self._resize(size, like)

    def _holds(self, rows: int, length: int) -> bool:
        return rows <= self._size[0] and length <= self._size[1]

    def _resize(self, size: tuple[int, int], like: list[Pair] | None) -> None:
        keep = (len(self.lengths), max(self.lengths, default=0))
        for index, layer in enumerate(self._layers()):
            keys, values = like[index] if like is not None else (layer.keys, layer.values)
            if keys is not None and values is not None:
                layer.resize(*size, (keys, values), keep)
        self._size = size


def keys_and_values(cache: DynamicCache) -> list[Pair]:
    """Of each layer; None where it looks at another one's."""
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


def _rounded(count: int, longest: int) -> tuple[int, int]:
    """Rows one, two, then by fours; lengths by the grain."""
    return (count if count <= 2 else -(-count // 4) * 4), -(-longest // GRAIN) * GRAIN

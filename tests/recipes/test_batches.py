"""Batches of tokens: packed and padded hold the same, and no target crosses a document."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.language.batches import IGNORED, TokenDataset
from recipes.language.grouping import Layout, group
from recipes.language.tokens import Tokens


def some_tokens(lengths: list[int], seed: int = 0) -> Tokens:
    draw = np.random.default_rng(seed)
    total = sum(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    is_target = draw.random(total) < 0.5
    return Tokens(
        ids=draw.integers(1, 1000, total).astype(np.int32),
        is_target=is_target,
        offsets=offsets,
        source=np.arange(len(lengths)),
        fingerprint="",
    )


def pairs(tokens: Tokens, document: int) -> list[tuple[int, int, int]]:
    """(position, input, target) of a document, by the book."""
    ids, is_target = tokens.document(document)
    return [(i, int(ids[i]), int(ids[i + 1]) if is_target[i + 1] else IGNORED) for i in range(len(ids) - 1)] + [
        (len(ids) - 1, int(ids[-1]), IGNORED)
    ]


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=30), data=st.data())
@settings(max_examples=80, deadline=None)
def test_both_layouts_hold_the_documents_as_they_are(lengths: list[int], data: st.DataObject) -> None:
    tokens = some_tokens(lengths)
    for layout in ("packed", "padded"):
        groups = group(tokens.lengths, 32, layout, 0)
        dataset = TokenDataset(tokens, groups, layout, pad_id=7)
        indices = data.draw(st.lists(st.integers(0, len(dataset) - 1), min_size=1, max_size=4))
        batch = dataset.batch(indices, epoch=0)
        expected = [int(d) for index in indices for d in groups.documents(index)]
        assert batch["document"].tolist() == expected and batch["bad"] == []
        for row, document in enumerate(expected):
            if layout == "packed":
                part: object = slice(int(batch["starts"][row]), int(batch["starts"][row + 1]))
            else:
                length = int(batch["attention_mask"][row].sum())
                part = (row, slice(0, length))
                assert batch["input_ids"][row, length:].tolist() == [7] * (batch["input_ids"].shape[1] - length)
                assert (batch["targets"][row, length:] == IGNORED).all()
            found = zip(*(batch[n][part].tolist() for n in ("position_ids", "input_ids", "targets")), strict=True)
            assert list(found) == pairs(tokens, document)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_types_and_an_empty_batch(layout: Layout) -> None:
    tokens = some_tokens([3, 5])
    dataset = TokenDataset(tokens, group(tokens.lengths, 8, layout, 0), layout)
    batch = dataset.batch([0], 0)
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "position_ids", "targets", "document"))
    empty = dataset.batch([], 0)
    assert len(empty["document"]) == 0 and empty["input_ids"].numel() == 0
    nothing = some_tokens([])
    assert len(TokenDataset(nothing, group(nothing.lengths, 8, layout, 0), layout)) == 0

"""Samples of a split as the model sees them, and what becomes of the rest."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from recipes.language.cache import cache_folder
from recipes.language.conversations import ConversationSplits
from recipes.language.grouping import group, padded_size
from recipes.language.tokens import TokenOptions, Tokens, tokenise
from trainer.errors import UserError
from trainer.task import Preview, PreviewSample

_PERCENTILES = (5, 25, 50, 75, 95, 99)


def preview(
    data: ConversationSplits, tokenizer: Any, options: TokenOptions, *, split: str, num: int, seed: int
) -> Preview:
    """`num` samples spread over the split, the lengths of all, and how full batches would be.

    Raises UserError for a split that there is none of, and for what `tokenise` does not take.
    """
    conversations = data.split(split)
    if conversations is None:
        raise UserError(f"--split: the data have no split {split!r}; they have: {', '.join(data.splits)}")
    lines = list(data.notes)
    tokens = tokenise(conversations, tokenizer, options, cache_folder(), lines.append, split)
    chosen = np.unique(np.linspace(0, len(tokens) - 1, max(num, 0)).astype(int)).tolist()
    samples = [_sample(tokens, index, conversations[int(tokens.source[index])].place, tokenizer) for index in chosen]
    lengths = tokens.lengths
    percentiles = {f"p{p}": int(np.percentile(lengths, p, method="nearest")) for p in _PERCENTILES}
    spread = {"min": int(lengths.min()), **percentiles, "max": int(lengths.max())}
    fill = _fill(tokens, options.max_length, seed)
    lines.append("lengths in tokens: " + ", ".join(f"{name} {value:,}" for name, value in spread.items()))
    lines.append(
        f"packed: {fill['packed_groups']:,} samples of up to {options.max_length:,} tokens, "
        f"{fill['packed']:.1%} of them text; padded: {fill['padded_groups']:,} samples, {fill['padded']:.1%} text"
    )
    facts = {
        "split": split,
        "max_length": options.max_length,
        **tokens.report,
        "rows": dict(data.counts[split]),
        "lengths": {**spread, "mean": round(float(lengths.mean()), 2)},
        "fill": fill,
        "notes": list(data.notes),
    }
    return Preview(samples, lines, facts)


def _sample(tokens: Tokens, index: int, place: str, tokenizer: Any) -> PreviewSample:
    ids, is_target = tokens.document(index)
    edges = [0, *(np.flatnonzero(np.diff(is_target)) + 1).tolist(), len(ids)]
    pieces = [
        (
            tokenizer.decode(ids[start:end].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False),
            bool(is_target[start]),
        )
        for start, end in pairwise(edges)
    ]
    return PreviewSample(place, pieces, len(ids), int(is_target.sum()))


def _fill(tokens: Tokens, budget: int, seed: int) -> dict[str, Any]:
    """Groups of each layout, and the share of what they hold that is text."""
    lengths = tokens.lengths
    packed, padded = (group(lengths, budget, layout, seed) for layout in ("packed", "padded"))
    total = int(lengths.sum())
    return {
        "packed_groups": len(packed),
        "packed": round(total / (len(packed) * budget), 4),
        "padded_groups": len(padded),
        "padded": round(total / padded_size(padded, lengths), 4),
    }

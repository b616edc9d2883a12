"""Batches of tokens: documents end to end, or as rows with padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from recipes.language.grouping import Groups, Layout
from recipes.language.tokens import Tokens
from trainer.task import Batch

IGNORED = -100
"""Target of a position whose prediction does not count, as in `torch.nn.functional.cross_entropy`."""


class TokenDataset:
    """One split: a sample is a group of documents.

    A packed batch has T tokens of D documents, end to end: `input_ids`, `position_ids` (from 0 in each document) and
    `targets`, int64 [T]; `starts`, where each document begins and the last one ends, D + 1 numbers; `document`, int64
    [D], its index in the tokens. A padded batch has R documents as rows: `input_ids`, `attention_mask`, `position_ids`
    and `targets`, int64 [R, L]; `document`, int64 [R]. A target is the next token of the same document where that one
    is a target, else `IGNORED`. `chosen`, int64 [N], are the positions that have one, counted through all rows, and
    `chosen_document`, int64 [N], the index of their documents: known here, they need not be looked for on the device.
    """

    def __init__(self, tokens: Tokens, groups: Groups, layout: Layout, pad_id: int = 0) -> None:
        """`pad_id` stands where `attention_mask` is 0."""
        self.tokens = tokens
        self.groups = groups
        self.layout = layout
        self._pad_id = pad_id

    def __len__(self) -> int:
        return len(self.groups)

    def batch(self, indices: Sequence[int], epoch: int) -> Batch:
        """The documents of these groups, in this order; every epoch has the same."""
        members = [self.groups.documents(index) for index in indices]
        documents = np.concatenate(members) if members else np.empty(0, np.int64)
        batch = self._packed(documents) if self.layout == "packed" else self._padded(documents)
        targets = batch["targets"].flatten()
        batch["chosen"] = (targets != IGNORED).nonzero()[:, 0]
        num_tokens = int((self.tokens.offsets[documents + 1] - self.tokens.offsets[documents]).sum())
        return batch | {"chosen_document": self._document_of(batch), "num_tokens": num_tokens, "bad": []}

    def _document_of(self, batch: Batch) -> torch.Tensor:
        """The document of each chosen position."""
        if "starts" in batch:
            ends = torch.tensor(batch["starts"][1:])
            row = torch.searchsorted(ends, batch["chosen"], right=True)
        else:
            row = batch["chosen"] // max(batch["targets"].shape[1], 1)
        documents: torch.Tensor = batch["document"]
        return documents[row]

    def _packed(self, documents: NDArray[np.int64]) -> Batch:
        starts, places, positions = self._places(documents)
        targets = np.full(len(places), IGNORED, np.int64)
        ids = self.tokens.ids[places].astype(np.int64)
        counts = self.tokens.is_target[places]
        counts[starts[:-1]] = False  # whatever the data say: nothing within the document comes before
        at = np.flatnonzero(counts)
        targets[at - 1] = ids[at]
        return {
            "input_ids": torch.from_numpy(ids),
            "position_ids": torch.from_numpy(positions),
            "targets": torch.from_numpy(targets),
            "starts": tuple(starts.tolist()),  # numbers: they shape the computation, and must not come from the device
            "document": torch.from_numpy(documents),
        }

    def _padded(self, documents: NDArray[np.int64]) -> Batch:
        packed = self._packed(documents)
        lengths = np.diff(packed["starts"])
        shape = (len(documents), int(lengths.max()) if len(lengths) else 0)
        columns = packed["position_ids"].numpy()
        rows = np.repeat(np.arange(len(documents)), lengths)
        filled = {"input_ids": self._pad_id, "attention_mask": 0, "position_ids": 0, "targets": IGNORED}
        batch: Batch = {}
        for name, filler in filled.items():
            table = np.full(shape, filler, np.int64)
            table[rows, columns] = 1 if name == "attention_mask" else packed[name].numpy()
            batch[name] = torch.from_numpy(table)
        return {**batch, "document": packed["document"]}

    def _places(self, documents: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Where each document begins in the batch, where each token stands in the data, and in its document."""
        offsets = self.tokens.offsets
        begins = offsets[documents]
        lengths = offsets[documents + 1] - begins
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        positions = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
        return starts, np.repeat(begins, lengths) + positions, positions

"""How well text is predicted: loss, perplexity and accuracy per token, with intervals by bootstrap over documents."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.task import Difference, Metrics

DOCUMENTS = "documents.csv"
INTERVALS = "intervals.json"
RESAMPLES = 2000
LEVEL = 0.95
Table = NDArray[np.float64]
"""[documents, 3]: summed loss, tokens predicted rightly, tokens."""


class LanguageMetrics(Metrics):
    """Sums per document, since documents and not tokens are what is drawn independently."""

    def __init__(self, num_documents: int, device: torch.device) -> None:
        # float64 where the device has it: sums must not depend on the order of the batches
        kind = torch.float32 if device.type == "mps" else torch.float64
        self.sums = {"documents": torch.zeros(num_documents, 3, dtype=kind, device=device)}

    def update(self, documents: Tensor, losses: Tensor, hits: Tensor) -> None:
        """Add N targets: index of their document, cross-entropy, whether the likeliest token was right; each [N]."""
        table = self.sums["documents"]
        rows = torch.stack(
            [losses.to(table.dtype), hits.to(table.dtype), torch.ones_like(losses, dtype=table.dtype)], 1
        )
        table.index_add_(0, documents, rows)

    def compute(self) -> dict[str, float]:
        return values(self._table())

    def write(self, folder: Path) -> list[Path]:
        """`documents.csv` with a row for each document, `intervals.json` with each metric and its interval."""
        table = self._table()
        with (folder / DOCUMENTS).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["document", "loss", "correct", "tokens"])
            writer.writerows([i, repr(float(loss)), int(hit), int(n)] for i, (loss, hit, n) in enumerate(table) if n)
        known = {name: found for name, found in intervals(table).items() if not any(map(math.isnan, found))}
        (folder / INTERVALS).write_text(json.dumps(known, indent=1))
        return [folder / DOCUMENTS, folder / INTERVALS]

    def compare(self, before: Path) -> list[Difference]:
        old, new = read(before), self._table()
        size = min(len(old), len(new))
        both = (old[:size, 2] > 0) & (new[:size, 2] > 0)
        return differences(old[:size][both], new[:size][both])

    def _table(self) -> Table:
        return self.sums["documents"].cpu().double().numpy()


def values(table: Table) -> dict[str, float]:
    """The metrics of a table: loss in nats per token, perplexity, token accuracy."""
    loss, hits, tokens = table.sum(0)
    mean = loss / tokens if tokens else math.nan
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700.0)) if tokens else math.nan,
        "token_accuracy": hits / tokens if tokens else math.nan,
    }


def intervals(table: Table) -> dict[str, list[float]]:
    """Each metric as [value, low, high], a 95 % interval by the percentile bootstrap (Efron 1979)."""
    drawn = _resampled(table[table[:, 2] > 0])
    return {name: [value, *_ends(drawn[name])] for name, value in values(table).items()}


def differences(before: Table, after: Table) -> list[Difference]:
    """Between two tables of the same documents, row by row."""
    first, second = _resampled(before), _resampled(after)
    old, new = values(before), values(after)
    return [
        Difference(
            name,
            (old[name], *_ends(first[name])),
            (new[name], *_ends(second[name])),
            (new[name] - old[name], *_ends(second[name] - first[name])),
        )
        for name in old
    ]


def read(folder: Path) -> Table:
    """What `LanguageMetrics.write` has written, with zeros for documents that are not in it."""
    with (folder / DOCUMENTS).open(newline="") as file:
        rows = [[float(row[key]) for key in ("document", "loss", "correct", "tokens")] for row in csv.DictReader(file)]
    table = np.zeros((int(max((row[0] for row in rows), default=-1)) + 1, 3))
    for document, *sums in rows:
        table[int(document)] = sums
    return table


def _resampled(table: Table) -> dict[str, Table]:
    """Each metric of `RESAMPLES` samples of the documents, drawn with replacement; equal draws for equal lengths."""
    draw = np.random.default_rng(0)
    sums, size = np.empty((RESAMPLES, 3)), len(table)
    for number in range(RESAMPLES):  # one at a time: a matrix of all draws would not fit for a million documents
        sums[number] = np.bincount(draw.integers(0, size, size), minlength=size) @ table if size else 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = sums[:, 0] / sums[:, 2]
        return {"loss": mean, "perplexity": np.exp(np.minimum(mean, 700)), "token_accuracy": sums[:, 1] / sums[:, 2]}


def _ends(drawn: Table) -> tuple[float, float]:
    low, high = (
        np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if not np.isnan(drawn).all() else (math.nan,) * 2
    )
    return float(low), float(high)

"""Golden requests: samples as a client sends them, with the run's own answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.errors import TrainerError, UserError
from trainer.export.opened import Opened
from trainer.task import Batch

FILE = "golden.jsonl"
_LOOKED_AT = 2000
"""Samples among which golden ones are chosen."""
_OTHER_EPOCHS = (1, 2, 3)


def choose(opened: Opened, count: int) -> list[int]:
    """Indices of `count` readable samples, spread over the split and, where there are labels, over the classes.

    Raises TrainerError where none can be read.
    """
    total = len(opened.dataset)
    step = max(1, total // _LOOKED_AT)
    kept: list[int] = []
    labels: list[int] = []
    pool = list(range(0, total, step))
    for start in range(0, len(pool), opened.batch_size):
        batch, indices = opened.batch(pool[start : start + opened.batch_size])
        kept += indices
        labels += _labels(batch, len(indices))
        if len(set(labels)) == len(labels) and len(kept) >= count:
            break
    if not kept:
        raise TrainerError(f"{opened.run.path}: no sample of {opened.split} can be read, so nothing can be proved")
    rank: dict[int, int] = {}
    order: list[tuple[int, int]] = []
    for index, label in zip(kept, labels, strict=True):  # the first of each class, then the second of each, ...
        rank[label] = rank.get(label, -1) + 1
        order.append((rank[label], index))
    return sorted(index for _, index in sorted(order)[:count])


def write(opened: Opened, indices: Sequence[int], folder: Path) -> int:
    """Write `golden.jsonl`; returns the number of requests."""
    lines = []
    for start in range(0, len(indices), opened.batch_size):
        batch, kept = opened.batch(indices[start : start + opened.batch_size])
        answers = opened.answers(batch)
        for row, index in enumerate(kept):
            outputs = {
                field.name: answer[row].tolist()
                for field, answer in zip(opened.servable.signature.outputs, answers, strict=True)
            }
            lines.append(json.dumps({"request": opened.servable.request(opened.split, index), "outputs": outputs}))
    (folder / FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def require_exact_preprocessing(opened: Opened, indices: Sequence[int]) -> None:
    """Raises UserError where the evaluation sees a sample differently each time: there is no such thing to serve."""
    if opened.servable.preprocessing.get("transform") is None:
        return
    first, _ = opened.batch(indices)
    for epoch in _OTHER_EPOCHS:
        other, _ = opened.batch(indices, epoch)
        pairs = zip(opened.servable.inputs(first), opened.servable.inputs(other), strict=True)
        if any(not torch.equal(a, b) for a, b in pairs):
            raise UserError(
                "data.transform: is random (a sample looks different with another seed), so no server can repeat what "
                "was evaluated: take the random transforms out of it; augmentation belongs into data.augment"
            )


def _labels(batch: Batch, count: int) -> list[int]:
    labels: Any = batch.get("label")
    is_class = isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point()
    return labels.tolist() if is_class else list(range(count))

"""Reference statistics of a bundle, `reference.json`: what inputs and answers looked like on the evaluated split.

Plain JSON. A histogram is `{"edges": [k + 1], "counts": [k]}`; the first and last bin take what lies beyond.
```
{"format": 1, "split": "val", "samples": 269,
 "inputs": {"image": {"dtype": "uint8", "features": [{"mean", "std", "min", "max", "histogram"}, ...]}},
 "sizes": {"height": histogram, "width": histogram, "samples"},          pictures only, before they are prepared
 "outputs": {"scores": {"features": [...]}},
 "labels": {"counts": {"0": 27, ...}},                                   the next three: classification only
 "confidence": histogram of the best score, "entropy": histogram in nats}
```
A feature is a channel of a picture, a column of a tensor [batch, columns] of at most 64 columns, else all of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from serving.inputs import Encoded, Sample
from serving.pictures import decode
from serving.signature import Signature
from trainer.task import Batch

FILE = "reference.json"
FORMAT = 1
BINS = 20
MOST_COLUMNS = 64
KEPT = 20_000
"""Values of a feature that histograms are made of; beyond that, a random part of them."""
MOST_SIZES = 2_000
"""Pictures whose size is looked at, which takes decoding them once more."""


class Feature:
    """Mean, deviation and histogram of one stream of numbers."""

    def __init__(self, seed: int, span: tuple[float, float] | None) -> None:
        self._draw = np.random.default_rng(seed)
        self._span = span
        self._count = 0
        self._mean = self._squares = 0.0
        self._low, self._high = math.inf, -math.inf
        self._kept: list[NDArray[np.float64]] = []
        self._keys: list[NDArray[np.float64]] = []
        self._counts = np.zeros(BINS, np.int64)

    def add(self, values: NDArray[Any]) -> None:
        """Take in numbers; those that are not finite are left out."""
        values = values.astype(np.float64).ravel()
        values = values[np.isfinite(values)]
        if not len(values):
            return
        # Chan et al. 1983: means and sums of squares of two parts, joined.
        mean, total = float(values.mean()), self._count + len(values)
        shift = mean - self._mean
        self._squares += float(((values - mean) ** 2).sum()) + shift**2 * self._count * len(values) / total
        self._mean += shift * len(values) / total
        self._count = total
        self._low, self._high = min(self._low, float(values.min())), max(self._high, float(values.max()))
        if self._span is not None:
            self._counts += _count(values, np.linspace(*self._span, BINS + 1))
        else:
            self._keep(values)

    def plain(self) -> dict[str, Any]:
        """For JSON; without numbers where there were none."""
        if not self._count:
            return {"count": 0}
        if self._span is not None:
            histogram = _histogram(np.linspace(*self._span, BINS + 1), self._counts)
        else:
            kept = np.concatenate(self._kept)
            edges = np.unique(np.quantile(kept, np.linspace(0, 1, BINS + 1)))
            edges = edges if len(edges) > 1 else np.array([edges[0], edges[0] + 1])
            histogram = _histogram(edges, _count(kept, edges))
        return {
            "count": self._count,
            "mean": self._mean,
            "std": math.sqrt(self._squares / self._count),
            "min": self._low,
            "max": self._high,
            "histogram": histogram,
        }

    def _keep(self, values: NDArray[np.float64]) -> None:
        """A sample without replacement of all that came: those with the smallest random keys."""
        kept = np.concatenate([*self._kept, values])
        keys = np.concatenate([*self._keys, self._draw.random(len(values))])
        if len(kept) > KEPT:
            smallest = np.argpartition(keys, KEPT)[:KEPT]
            kept, keys = kept[smallest], keys[smallest]
        self._kept, self._keys = [kept], [keys]


class Reference:
    """Statistics of a split; sees its batches (`survey.Witness`)."""

    def __init__(self, signature: Signature, channels: int | None, is_classification: bool) -> None:
        """`channels`: of the pictures that are sent; None where none are."""
        self._signature = signature
        self._channels = channels
        self._samples = 0
        self._inputs: dict[str, list[Feature]] = {}
        self._outputs: dict[str, list[Feature]] = {}
        self._sizes = (Feature(0, None), Feature(1, None))
        self._sized = 0
        self._labels = signature.labels if is_classification else None
        count = len(signature.labels or ())
        self._predicted = np.zeros(count, np.int64)
        self._confidence = Feature(2, (0.0, 1.0))
        self._entropy = Feature(3, (0.0, math.log(max(2, count))))

    def see(
        self, batch: Batch, answers: Sequence[Tensor], arrays: list[NDArray[Any]], samples: Sequence[Sample]
    ) -> None:
        """Take in one batch."""
        self._samples += len(samples)
        for field, array in zip(self._signature.inputs, arrays, strict=True):
            span = (0.0, 255.0) if field.dtype == "uint8" else None
            _add(self._inputs.setdefault(field.name, []), array, span)
        for field, answer in zip(self._signature.outputs, answers, strict=True):
            span = (0.0, 1.0) if field.unit == "probability" else None
            _add(self._outputs.setdefault(field.name, []), answer.numpy(), span)
        if self._channels is not None:
            for sample in samples:
                self._size(sample, self._channels)
        if self._labels is not None:
            scores = answers[0].double().numpy()
            self._predicted += np.bincount(scores.argmax(1), minlength=len(self._predicted))
            self._confidence.add(scores.max(1))
            self._entropy.add(-(scores * np.log(np.maximum(scores, 1e-300))).sum(1))

    def plain(self, split: str) -> dict[str, Any]:
        """The content of `reference.json`."""
        found: dict[str, Any] = {
            "format": FORMAT,
            "split": split,
            "samples": self._samples,
            "inputs": {
                field.name: {"dtype": field.dtype, "features": [f.plain() for f in self._inputs.get(field.name, [])]}
                for field in self._signature.inputs
            },
            "outputs": {
                field.name: {"features": [f.plain() for f in self._outputs.get(field.name, [])]}
                for field in self._signature.outputs
            },
        }
        if self._channels is not None:
            height, width = (feature.plain() for feature in self._sizes)
            found["sizes"] = {"height": height, "width": width, "samples": self._sized}
        if self._labels is not None:
            found["labels"] = {"counts": dict(zip(self._labels, self._predicted.tolist(), strict=True))}
            found["confidence"] = self._confidence.plain()
            found["entropy"] = self._entropy.plain()
        return found

    def _size(self, sample: Sample, channels: int) -> None:
        if self._sized >= MOST_SIZES:
            return
        picture = decode(sample.data, channels) if isinstance(sample, Encoded) else sample[0]
        self._sized += 1
        for feature, length in zip(self._sizes, picture.shape, strict=False):
            feature.add(np.array([length]))


def _add(features: list[Feature], array: NDArray[Any], span: tuple[float, float] | None) -> None:
    is_columns = array.ndim == 2 and array.shape[1] <= MOST_COLUMNS
    count = array.shape[1] if array.ndim == 4 or is_columns else 1
    while len(features) < count:
        features.append(Feature(len(features), span))
    for number in range(count):
        features[number].add(array[:, number] if count > 1 else array)


def _count(values: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.int64]:
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return counts.astype(np.int64)


def _histogram(edges: NDArray[np.float64], counts: NDArray[np.int64]) -> dict[str, Any]:
    return {"edges": edges.tolist(), "counts": counts.tolist()}

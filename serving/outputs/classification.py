"""Probabilities of classes: the best label, its score, and all scores in the order of the labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serving.errors import BadBundle
from serving.outputs import Row
from serving.signature import Signature


class Classification:
    """Tells the first output, [num_classes] probabilities."""

    def __init__(self, labels: tuple[str, ...]) -> None:
        self._labels = labels

    def render(self, row: Row, top: int | None = None) -> dict[str, Any]:
        scores = row[0]
        index = int(scores.argmax())
        best = {"label": self._labels[index], "index": index, "score": float(scores[index])}
        if top is None:
            return {**best, "scores": scores.tolist()}
        order = (-scores).argsort(kind="stable")[:top].tolist()
        return {**best, "top": [{"label": self._labels[i], "index": i, "score": float(scores[i])} for i in order]}

    def schema(self) -> dict[str, Any]:
        number = {"type": "number"}
        entry: dict[str, Any] = {"label": {"type": "string"}, "index": {"type": "integer"}, "score": number}
        ranked = {"type": "object", "properties": entry, "required": list(entry)}
        count = len(self._labels)
        scores = {"type": "array", "items": number, "minItems": count, "maxItems": count}
        return {
            "type": "object",
            "properties": {**entry, "scores": scores, "top": {"type": "array", "items": ranked}},
            "required": list(entry),
        }


def build(spec: Mapping[str, Any], signature: Signature) -> Classification:
    if signature.labels is None or signature.outputs[0].shape != (-1, len(signature.labels)):
        raise BadBundle("bundle.json: postprocessing: classification needs labels, one for each score")
    return Classification(signature.labels)

"""What a version's answer says, as far as a rollout looks into it."""

from __future__ import annotations

import json
import math
import re
from typing import Any

LOOKED_AT = 65_536
"""Bytes of an answer in which its label is looked for."""
_LABEL = re.compile(rb'"label"\s*:\s*("(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?)')


def label_of(content_type: str, body: bytes) -> str | None:
    """The label of the first prediction; None where the answer is no prediction of labels.

    Found by its pattern: to parse a thousand scores for one label would cost more than to forward them.
    """
    if not content_type.startswith("application/json"):
        return None
    match = _LABEL.search(body, 0, LOOKED_AT)
    if match is None:
        return None
    try:
        return str(json.loads(match[1]))
    except ValueError:
        return None


def predictions_of(body: bytes) -> list[Any]:
    """The `predictions` of an answer. Raises ValueError where there are none."""
    content = json.loads(body)
    found = content.get("predictions") if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise ValueError("the answer has no list `predictions`")
    return found


def deviation(expected: Any, answered: Any) -> float:
    """Largest difference between two predictions, |a - e| / max(1, |e|); infinite where form or text differ."""
    if isinstance(expected, bool) or isinstance(answered, bool) or expected is None or answered is None:
        return 0.0 if expected is answered else math.inf
    if isinstance(expected, int | float) and isinstance(answered, int | float):
        off = abs(answered - expected) / max(1.0, abs(expected))
        return off if off == off else math.inf
    if isinstance(expected, dict) and isinstance(answered, dict) and expected.keys() == answered.keys():
        return max((deviation(value, answered[key]) for key, value in expected.items()), default=0.0)
    if isinstance(expected, list) and isinstance(answered, list) and len(expected) == len(answered):
        return max((deviation(*pair) for pair in zip(expected, answered, strict=True)), default=0.0)
    return 0.0 if type(expected) is type(answered) and expected == answered else math.inf

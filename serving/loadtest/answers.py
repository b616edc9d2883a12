"""Whether an answer is the one that was expected, numbers within a tolerance."""

from __future__ import annotations

import json
from typing import Any


def difference(body: bytes | str | None, expected: Any, tolerance: float) -> str | None:
    """What is wrong with a JSON answer, in a few words; None where it is right.

    Args:
        expected: what must be in it: every key of an object, every entry of a list. Numbers may be off by
            `tolerance` × max(1, |expected|); more keys than expected are fine.
    """
    try:
        content = json.loads(body or b"")
    except ValueError:
        return "the answer is no JSON"
    return _difference(content, expected, tolerance, "")


def _difference(found: Any, expected: Any, tolerance: float, where: str) -> str | None:
    if isinstance(expected, dict):
        if not isinstance(found, dict):
            return f"{where or 'the answer'} is no object"
        for key, value in expected.items():
            if key not in found:
                return f"{where}.{key} is missing".lstrip(".")
            if wrong := _difference(found[key], value, tolerance, f"{where}.{key}".lstrip(".")):
                return wrong
        return None
    if isinstance(expected, list):
        if not isinstance(found, list) or len(found) != len(expected):
            return f"{where} is no list of {len(expected)}"
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            if wrong := _difference(one, other, tolerance, f"{where}[{number}]"):
                return wrong
        return None
    is_number = isinstance(expected, float) and isinstance(found, int | float) and not isinstance(found, bool)
    right = abs(found - expected) <= tolerance * max(1.0, abs(expected)) if is_number else found == expected
    return None if right else f"{where} is {str(found)[:40]}, not {str(expected)[:40]}"

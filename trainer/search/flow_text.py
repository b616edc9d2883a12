"""Plain values as text that the loader reads back as exactly these values."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from trainer.yaml_source import parse_scalar

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")


def overrides(params: Mapping[str, Any]) -> list[str]:
    """`dotted.key=value` for each parameter, in their order, but names of components first.

    A component's name takes over none of the options that another one had, so it must not come after them. A mapping
    inside a section takes two: the first clears what is there, since mappings are merged. Raises ValueError as
    `flow_text` does.
    """
    texts: list[str] = []
    for key in sorted(params, key=lambda key: not is_component_name(key)):
        if isinstance(params[key], dict) and params[key] and "." in key:
            texts.append(f"{key}={{}}")
        texts.append(f"{key}={flow_text(params[key])}")
    return texts


def is_component_name(key: str) -> bool:
    """Whether a key of a config, such as `optimizer.name`, names a component."""
    return key.endswith(".name") and key.count(".") == 1


def flow_text(value: Any) -> str:
    """A plain value on one line, as YAML's flow style has it, such that it is read back as exactly this value.

    Raises ValueError for what no config can hold: a number that is not finite, or a type of another kind.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is no value that a config can hold")
        return float.__repr__(value)
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(flow_text(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(key)}: {flow_text(item)}" for key, item in value.items()) + "}"
    raise ValueError(f"{type(value).__name__} is no type that a config can hold")


def _quoted(text: str) -> str:
    # A plain word needs no quotes; everything else is escaped so far that it fits on one line of any terminal.
    if _PLAIN.fullmatch(text) and parse_scalar(text) == text:
        return text
    return '"' + "".join(_escaped(character) for character in text) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"

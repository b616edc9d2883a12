"""YAML into frozen dataclasses, strictly: an unknown key or a wrong type is a mistake, told with the keys there are."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from serving.errors import Mistake

T = TypeVar("T")


def read_yaml(path: Path) -> Any:
    """The plain data of a YAML file. Raises Mistake for a file that can't be read, or that names a key twice."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise Mistake(f"{path}: can't be read: {reason}") from error
    try:
        _refuse_twice(yaml.compose(text, Loader=yaml.SafeLoader), path)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise Mistake(f"{path}: not YAML: {' '.join(str(error).split())}") from error


def build(cls: type[T], data: Any, where: str) -> T:
    """A `cls` from plain data; `where` (file and key) begins what is said of a mistake. Raises Mistake."""
    if not isinstance(data, Mapping):
        raise Mistake(f"{where}: got {_shown(data)}, wanted keys and values")
    hints = get_type_hints(cls)
    known = {item.name: item for item in fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f", did you mean {close[0]!r}?" if close else ""
            raise Mistake(f"{where}: unknown key {str(key)!r}{hint}; there are: {', '.join(known)}")
    for name, item in known.items():
        if name not in data and item.default is MISSING and item.default_factory is MISSING:
            raise Mistake(f"{where}: {name} is missing")
    values = {str(key): _value(hints[key], value, f"{where}: {key}") for key, value in data.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise Mistake(f"{where}: {error}") from error


def _value(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _value(next(a for a in arguments if a is not type(None)), value, where)
    if origin is Literal:
        if value in arguments:
            return value
        close = difflib.get_close_matches(str(value), [str(a) for a in arguments], n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise Mistake(f"{where}: got {_shown(value)}, wanted one of {', '.join(map(str, arguments))}{hint}")
    if origin is tuple:
        if not isinstance(value, list):
            raise Mistake(f"{where}: got {_shown(value)}, wanted a list")
        return tuple(_value(arguments[0], entry, f"{where}[{index}]") for index, entry in enumerate(value))
    if is_dataclass(kind):
        return build(kind, value, where)  # type: ignore[arg-type]
    return _plain(kind, value, where)


def _plain(kind: Any, value: Any, where: str) -> Any:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if value != value or value in (float("inf"), float("-inf")):
            raise Mistake(f"{where}: got {value}, wanted a finite number")
        return float(value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise Mistake(f"{where}: got {_shown(value)}, wanted {names[kind]}")


def _refuse_twice(node: yaml.Node | None, path: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                raise Mistake(f"{path}:{key.start_mark.line + 1}: {key.value!r} is given twice")
            seen.add(key.value)
            _refuse_twice(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            _refuse_twice(entry, path)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

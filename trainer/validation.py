"""Check plain data against a dataclass: types, bounds, unknown and missing keys, all problems together.

pydantic's validators do the checking. They are made from `pydantic_core` alone: importing the whole of pydantic
takes more CPU time than a config error may (0.4 s against 0.1 s).
"""

from __future__ import annotations

import re
import types
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from pydantic_core import SchemaValidator, ValidationError

from trainer.component import Component, did_you_mean
from trainer.yaml_source import Node

Path: TypeAlias = tuple[str | int, ...]
Problems: TypeAlias = list[tuple[Path, str]]

BOUND = re.compile(r"(>=|<=|>|<) *(-?[0-9]+(?:\.[0-9]+)?(?:[eE]-?[0-9]{1,2})?)")
_BOUND_NAMES = {">=": "ge", "<=": "le", ">": "gt", "<": "lt"}
_SIMPLE: dict[Any, tuple[dict[str, Any], str]] = {
    str: ({"type": "str", "strict": True}, "text"),
    int: ({"type": "int", "strict": True}, "a whole number"),
    float: ({"type": "float", "strict": True, "allow_inf_nan": False}, "a number"),
    bool: ({"type": "bool", "strict": True}, "true or false"),
    type(None): ({"type": "none"}, "null"),
    None: ({"type": "none"}, "null"),
    Any: ({"type": "any"}, "any value"),
    list: ({"type": "list", "strict": True}, "a list"),
    tuple: ({"type": "list", "strict": True}, "a list"),
    dict: ({"type": "dict", "strict": True, "keys_schema": {"type": "str"}}, "a mapping"),
}


class UnsupportedType(TypeError):
    """A field's type that a config cannot have."""


@cache
def field_types(cls: type) -> dict[str, Any]:
    """Field name -> resolved type, bounds included, in the order of the dataclass `cls`."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in fields(cls) if field.init}


def default_of(field: Field[Any]) -> Any:
    """A field's default as plain data, or `MISSING`."""
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    return value if value is MISSING else to_plain(value)


def to_plain(value: Any) -> Any:
    """The same data as dicts, lists and scalars, a component as a config has it."""
    if isinstance(value, Component):
        return {"name": value.name, **to_plain(value.options)}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def bounds_of(annotated: Any) -> list[tuple[str, int | float]]:
    """(operator, number) of each bound of an `Annotated` type. Raises UnsupportedType for another annotation."""
    bounds = []
    for text in annotated.__metadata__:
        match = BOUND.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise UnsupportedType(f"{text!r} is no bound: write a string such as '> 0' or '<= 1'")
        bounds.append((match[1], int(match[2]) if match[2].isdecimal() else float(match[2])))
    return bounds


def union_members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of `A | B`; empty for any other type."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else ()


def core_schema(hint: Any) -> dict[str, Any]:
    """pydantic-core's schema of a type. Raises UnsupportedType."""
    if isinstance(hint, type) and is_dataclass(hint):
        return _fields_schema(hint)
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        schema = core_schema(args[0])
        if schema["type"] not in ("int", "float"):
            raise UnsupportedType(f"bounds need a number, not {describe(args[0])}")
        return schema | {_BOUND_NAMES[sign]: number for sign, number in bounds_of(hint)}
    if origin is Literal:
        return {"type": "literal", "expected": list(args)}
    if members := union_members(hint):
        choices = [core_schema(member) for member in members if member is not type(None)]
        schema = choices[0] if len(choices) == 1 else {"type": "union", "choices": choices}
        return {"type": "nullable", "schema": schema} if type(None) in members else schema
    if origin is list or (origin is tuple and args[-1] is ...):
        return {"type": "list", "strict": True, "items_schema": core_schema(args[0])}
    if origin is tuple:
        return {"type": "tuple", "strict": False, "items_schema": [core_schema(arg) for arg in args]}
    if origin is dict and args[0] is str:
        return {"type": "dict", "strict": True, "keys_schema": {"type": "str"}, "values_schema": core_schema(args[1])}
    try:
        return _SIMPLE[hint][0]
    except (KeyError, TypeError):
        raise UnsupportedType(
            f"type {getattr(hint, '__name__', hint)} cannot stand in a config: use built-in types and Literal"
        ) from None


def _fields_schema(cls: type) -> dict[str, Any]:
    types_by_name = field_types(cls)
    schemas = {}
    for field in fields(cls):
        if field.name not in types_by_name:
            continue
        try:
            schema = core_schema(types_by_name[field.name])
        except UnsupportedType as error:
            raise UnsupportedType(f"{field.name}: {error}") from error
        default = default_of(field)
        if default is not MISSING:
            schema = {"type": "default", "schema": schema, "default": default, "copy_default": True}
        schemas[field.name] = {"type": "typed-dict-field", "schema": schema, "required": default is MISSING}
    return {"type": "typed-dict", "fields": schemas, "extra_behavior": "forbid", "strict": True}


@cache
def _validator(cls: type) -> SchemaValidator:
    schema: Any = core_schema(cls)
    return SchemaValidator(schema)


def check(cls: type, node: Node, problems: Problems) -> dict[str, Any] | None:
    """Check a mapping against the dataclass `cls`.

    Returns plain data with the defaults filled in, or None with the problems, by their path below `node`, added to
    `problems`. Raises UnsupportedType where a field of `cls` has a type that no config can have.
    """
    data = _adapt(node, cls)
    try:
        checked: dict[str, Any] = to_plain(_validator(cls).validate_python(data))
    except ValidationError as error:
        seen: set[Path] = set()
        for detail in error.errors(include_url=False, include_context=False):
            too_short = detail["type"] == "missing" and isinstance(detail["loc"][-1], int)
            path, hint = _follow(cls, detail["loc"][:-1] if too_short else detail["loc"])
            if path not in seen:
                seen.add(path)
                problems.append((path, _message("" if too_short else detail["type"], detail["input"], path, hint)))
        return None
    return checked


def _adapt(node: Node, hint: Any) -> Any:
    """Plain data; where `hint` is a Literal of texts, an unquoted scalar (`precision: 32`) is taken as written."""
    if isinstance(node.value, dict):
        return {key: _adapt(child, _below(hint, key)) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [_adapt(child, _below(hint, index)) for index, child in enumerate(node.value)]
    for member in union_members(hint) or (hint,):
        if get_origin(member) is Literal and node.value not in get_args(member) and node.text in get_args(member):
            return node.text
    return node.value


def _below(hint: Any, step: str | int) -> Any:
    """The type of one key or item of a value of type `hint`."""
    for member in union_members(hint) or (hint,):
        origin, args = get_origin(member), get_args(member)
        if isinstance(step, int):
            if origin is list or (origin is tuple and args[-1] is ...):
                return args[0]
            if origin is tuple and step < len(args):
                return args[step]
        elif isinstance(member, type) and is_dataclass(member):
            return field_types(member).get(step, Any)
        elif origin is dict:
            return args[1]
    return Any


def _follow(hint: Any, location: Path) -> tuple[Path, Any]:
    """The part of an error's location that a user wrote, and the type wanted there.

    pydantic names the alternative it tried after a union's key; a union is reported once, as a whole.
    """
    path: Path = ()
    for step in location:
        if len([member for member in union_members(hint) if member is not type(None)]) > 1:
            break
        hint = _below(hint, step)
        path = (*path, step)
    return path, hint


def _message(kind: str, got: Any, path: Path, hint: Any) -> str:
    if kind == "extra_forbidden":
        return f"unknown key {str(path[-1])!r}"
    if kind == "missing":
        return f"missing: wants {describe(hint)}"
    wanted = describe(hint)
    message = f"got {describe_value(got)}, wanted {wanted}"
    if isinstance(got, str):
        options = [option for member in union_members(hint) or (hint,) for option in _literals(member)]
        message += did_you_mean(got, options)
    elif wanted.startswith("text") and isinstance(got, int | float):
        message += ": put it in quotes"
    return message


def _literals(hint: Any) -> list[str]:
    return [option for option in get_args(hint) if isinstance(option, str)] if get_origin(hint) is Literal else []


def describe(hint: Any) -> str:
    """What a type wants, in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = " and ".join(f"{sign} {number}" for sign, number in bounds_of(hint))
        return f"{describe(args[0])} {bounds}"
    if origin is Literal:
        return "one of " + ", ".join(_word(option) for option in args) if len(args) > 1 else _word(args[0])
    if members := union_members(hint):
        return " or ".join(describe(member) for member in members)
    if origin is list or (origin is tuple and args[-1] is ...):
        return f"a list (each {describe(args[0])})"
    if origin is tuple:
        return f"a list of {len(args)} ({', '.join(describe(arg) for arg in args)})"
    if origin is dict:
        return "a mapping" if args[1] is Any else f"a mapping (each {describe(args[1])})"
    if isinstance(hint, type) and is_dataclass(hint):
        return "a mapping"
    return _SIMPLE[hint][1]


def describe_value(value: Any) -> str:
    """What was written, in words and shortened."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        return f"the text {value if len(value) <= 60 else value[:57] + '...'!r}"
    word = _word(value)
    return word if len(word) <= 60 else word[:57] + "..."


def _word(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)

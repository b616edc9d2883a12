"""The JSON Schema of a config, so that editors complete and check the YAML while it is written.

It says what `trainer.load` says, short of what a schema cannot express: rules between fields, a component's own
`__post_init__`, and, for a file with `extends:`, which component a section without `name` belongs to.
"""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from trainer import config
from trainer.component import KINDS, Component, available, spec
from trainer.component_source import read_help
from trainer.config import Loading, RunConfig
from trainer.layers import DEFAULT_COMPONENTS, OPTIONAL_COMPONENTS, PLACES, SECTIONS, SPACE
from trainer.load import component_fields
from trainer.validation import bounds_of, default_of, field_types, union_members
from trainer.yaml_source import parse_scalar

Schema = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"

_SIMPLE: dict[Any, Schema] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    Any: {},
    list: {"type": "array"},
    tuple: {"type": "array"},
    dict: {"type": "object"},
}
_BOUNDS = {">=": "minimum", "<=": "maximum", ">": "exclusiveMinimum", "<": "exclusiveMaximum"}
_DOTTED = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$"


def json_schema() -> Schema:
    """The schema (draft 2020-12) of a whole config, with every component that ships."""
    definitions: Schema = {}
    for kind in KINDS:
        definitions |= _component_definitions(kind)
    names = [item.name for item in fields(RunConfig) if item.name != "loading"]
    help_by_field = _help(RunConfig)
    types = field_types(RunConfig)
    defaults = {item.name: default_of(item) for item in fields(RunConfig) if item.name not in SECTIONS}
    properties: Schema = {"extends": _EXTENDS}
    for name in names:
        if name in KINDS:
            properties[name] = {"$ref": f"#/$defs/{name}"}
        elif name in SECTIONS:
            properties[name] = {**_object(SECTIONS[name]), "type": ["object", "null"]}
        else:
            properties[name] = _field(types[name], defaults[name])
        properties[name]["description"] = help_by_field[name]
    section, key = SPACE
    properties[section]["properties"][key]["additionalProperties"] = _ENTRY
    required = [name for name in names if defaults.get(name) is MISSING and name not in DEFAULT_COMPONENTS]
    return {
        "$schema": DIALECT,
        "title": "trainer config",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        # A file that extends another one may leave out whatever the other one says.
        "if": {"required": ["extends"]},
        "else": {
            "required": required,
            "properties": _completions(),
        },
        "$defs": definitions,
    }


def _completions() -> Schema:
    """What each component needs in a file that extends no other, by its place in the config."""
    result: Schema = {}
    for place, kind in PLACES.items():
        inner = result
        for section in place[:-1]:
            inner = inner.setdefault(section, {"properties": {}})["properties"]
        inner[place[-1]] = {"$ref": f"#/$defs/{kind}_complete"}
    return result


_EXTENDS: Schema = {
    "description": "Config, or list of configs, to start from; found beside this file, then among those that ship.",
    "anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "items": {"type": "string", "minLength": 1}}],
}

_NUMBERS: Schema = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
_ENTRY: Schema = {
    "description": "A distribution, and under which values of other keys of the space it is varied.",
    "type": ["object", "null"],
    "properties": {
        "uniform": {**_NUMBERS, "description": "[low, high]: a number."},
        "log_uniform": {**_NUMBERS, "description": "[low, high]: a number, on a log scale; low is above 0."},
        "int": {**_NUMBERS, "items": {"type": "integer"}, "description": "[low, high]: a whole number, both included."},
        "quantized": {
            **_NUMBERS,
            "minItems": 3,
            "maxItems": 3,
            "description": "[low, high, step]: low, low + step, ...",
        },
        "choice": {"type": "array", "minItems": 1, "uniqueItems": True, "description": "One of these values."},
        "log": {"type": "boolean", "description": "Draw an int on a log scale."},
        "when": {"type": "object", "description": "Key of the space -> value, or list of values, that it must have."},
    },
    "additionalProperties": False,
    "if": {"type": "object"},
    "then": {"oneOf": [{"required": [kind]} for kind in ("uniform", "log_uniform", "int", "quantized", "choice")]},
}


def _component_definitions(kind: str) -> Schema:
    names = available(kind)
    variants = {f"{kind}.{name}": _variant(kind, name) for name in names}
    shared = _object(Loading)["properties"] if kind == "data" else {}
    own_module: Schema = {
        "type": "object",
        "description": f"A {kind} of your own, by the dotted name of its module.",
        "properties": {"name": {"type": "string", "pattern": _DOTTED}, **shared},
        "required": ["name"],
    }
    short: Schema = {"anyOf": [{"enum": names}, {"type": "string", "pattern": _DOTTED}]}
    options: list[Schema] = [{"$ref": f"#/$defs/{key}"} for key in variants]
    required = {name: keys for name in names if (keys := _required(component_fields(kind, name)))}
    needs: list[Schema] = [
        {"if": {"properties": {"name": {"const": name}}, "required": ["name"]}, "then": {"required": keys}}
        for name, keys in required.items()
    ]
    without_name: Schema = {"required": ["name"]}
    if kind in DEFAULT_COMPONENTS or kind in OPTIONAL_COMPONENTS:
        options.append({"type": "null"})
    if kind in DEFAULT_COMPONENTS:
        without_name = {"$ref": f"#/$defs/{kind}.{DEFAULT_COMPONENTS[kind]}"}
    complete = {
        "if": {"type": "object"},
        "then": {"allOf": [{"if": {"not": {"required": ["name"]}}, "then": without_name}, *needs]},
        "else": {"not": {"enum": list(required)}},
    }
    return {**variants, kind: {"anyOf": [short, *options, own_module]}, f"{kind}_complete": complete}


def _variant(kind: str, name: str) -> Schema:
    found = spec(kind, name)
    cls = component_fields(kind, name)
    shared_help = _help(Loading) if kind == "data" else {}
    result = _object(cls, {**shared_help, **found.help_by_field})
    result["properties"] = {"name": {"const": name, "description": found.doc}, **result["properties"]}
    result.pop("required", None)
    return {**result, "description": found.doc}


def _object(cls: type, help_by_field: dict[str, str] | None = None) -> Schema:
    described = _help(cls) if help_by_field is None else help_by_field
    types = field_types(cls)
    properties = {}
    for item in fields(cls):
        if types[item.name] is Component:
            properties[item.name] = {"$ref": f"#/$defs/{item.name}"}
        else:
            properties[item.name] = _field(types[item.name], default_of(item))
        if described.get(item.name):
            properties[item.name]["description"] = described[item.name]
    result: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    required = _required(cls)
    return {**result, "required": required} if required else result


def _required(cls: type) -> list[str]:
    return [item.name for item in fields(cls) if item.default is MISSING and item.default_factory is MISSING]


def _field(hint: Any, default: Any) -> Schema:
    schema = dict(_type(hint))
    return schema if default is MISSING else {**schema, "default": default}


def _type(hint: Any) -> Schema:
    if isinstance(hint, type) and is_dataclass(hint):
        return _object(hint)
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return {**_type(args[0]), **{_BOUNDS[sign]: number for sign, number in bounds_of(hint)}}
    if origin is Literal:
        # `precision: 32` is a number to an editor, and taken as the text by the loader.
        unquoted = [parse_scalar(option) for option in args if isinstance(option, str)]
        return {"enum": [*args, *(value for value in unquoted if value not in args)]}
    if members := union_members(hint):
        return {"anyOf": [_type(member) for member in members]}
    if origin is list or (origin is tuple and args[-1] is ...):
        return {"type": "array", "items": _type(args[0])}
    if origin is tuple:
        return {"type": "array", "prefixItems": [_type(arg) for arg in args], "minItems": len(args), "items": False}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type(args[1])}
    return _SIMPLE[hint]


def _help(cls: type) -> dict[str, str]:
    assert config.__file__ is not None
    _doc, help_by_field = read_help(Path(config.__file__)).get(cls.__name__, ("", {}))
    return help_by_field

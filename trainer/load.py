"""From YAML and overrides to a `RunConfig`, and back to YAML: one strict loader, all problems together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, field, fields, is_dataclass, make_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from trainer.component import KINDS, Component, ComponentSpec, construct, did_you_mean, locate, read_config_class, spec
from trainer.config import Holdout, Loading, RunConfig, Tune
from trainer.config_rules import cross_check, untaken
from trainer.errors import ConfigError, Problem, UserError
from trainer.layers import (
    LOADING_KEYS,
    OPTIONAL_COMPONENTS,
    PLACES,
    SECTIONS,
    Place,
    find_config,
    read_layers,
    shipped_configs,
    with_overrides,
)
from trainer.search.rules import tune_problems
from trainer.validation import Path as KeyPath
from trainer.validation import UnsupportedType, check, describe_value, field_types, to_plain
from trainer.yaml_source import FLOAT, INT, Node

__all__ = ["as_dict", "component_fields", "diff", "dump", "find_config", "load", "shipped_configs"]

UNTOLD = (Holdout, Tune)
"""Sections that stand in no written config as long as nothing is set in them."""


def load(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load a config by path or shipped name, with `dotted.key=value` overrides.

    The value of an override is a scalar, taken as written up to its end (`#` and `:` included), or a YAML flow
    value where it begins with `{`, `[` or a quote. `key=` sets the empty text, `key=null` sets null.

    Raises ConfigError with every problem; nothing else, whatever the file holds.
    """
    problems: list[Problem] = []
    root = read_layers(source, overrides, problems)
    return _Resolver(root, problems).resolve()


def component_fields(kind: str, name: str) -> type:
    """A dataclass with all keys of a component's section but `name`: the shared ones first, then its own.

    Raises UserError or ConfigError for a component that does not exist or cannot be read.
    """
    return _component_fields(kind, name, locate(kind, name))


@cache
def _component_fields(kind: str, name: str, path: Path) -> type:
    own = read_config_class(path).config_class
    shared = list(fields(Loading)) if kind == "data" else []
    taken = {"name", *(item.name for item in shared)} & {item.name for item in fields(own)}
    if taken:
        raise UserError(f"{kind} {name}: Config must not have a field {min(taken)!r}, which every {kind} section has")
    types = field_types(Loading) | field_types(own)
    return make_dataclass(
        "Config",
        [
            (item.name, types[item.name], field(default=item.default, default_factory=item.default_factory))
            for item in (*shared, *fields(own))
            if item.init
        ],
        frozen=True,
        kw_only=True,
    )


@cache
def _own_fields(cls: type) -> type:
    """The fields of a section (`RunConfig` is the one at the top) that are neither sections nor components."""
    types = field_types(cls)
    own = [item for item in fields(cls) if not is_dataclass(types[item.name]) and item.name not in KINDS]
    return make_dataclass(
        cls.__name__,
        [
            (item.name, types[item.name], field(default=item.default, default_factory=item.default_factory))
            for item in own
        ],
        frozen=True,
        kw_only=True,
    )


class _Resolver:
    """One load: section after section is checked, and what is wrong is gathered."""

    def __init__(self, root: Node, problems: list[Problem]) -> None:
        assert isinstance(root.value, dict)
        self.root = root
        self.entries = root.value
        self.problems = problems
        self.failed: set[str] = set()
        self.keys = {name: list(field_types(cls)) for name, cls in SECTIONS.items()}
        self.keys[""] = [item.name for item in fields(RunConfig) if item.name != "loading"]
        self.unknown: list[tuple[str, KeyPath]] = []

    def resolve(self) -> RunConfig:
        """The config, or ConfigError with everything that is wrong."""
        top = {key: node for key, node in self.entries.items() if key not in SECTIONS and key not in KINDS}
        values = self.check("", _own_fields(RunConfig), Node(top, self.root.file, 0), ()) or {"name": "unnamed"}
        for name, cls in SECTIONS.items():
            values[name] = self.section(name, cls)
        for (kind,) in (place for place in PLACES if len(place) == 1):
            values[kind] = self.component((kind,))
        data = values["data"]
        loading = Loading(**{key: data.options.pop(key) for key in LOADING_KEYS if key in data.options})
        config = RunConfig(loading=loading, **values)
        for problem in (*cross_check(config), *untaken(config)):
            path: KeyPath = tuple(problem.key.split("."))
            if (path[0] if path[0] in SECTIONS else "") not in self.failed:
                self.report(path, problem.message)
        if "tune" not in self.failed:
            for path, message in tune_problems(config, self.tried):
                self.report(path, message)
        for section, path in self.unknown:
            self.report(path, f"unknown key {path[-1]!r}{self.hint(section, path)}")
        if self.problems:
            # Without a file: something is missing. Command line last, as it is read last.
            raise ConfigError(
                sorted(self.problems, key=lambda problem: (problem.line == 0, problem.file, problem.line))
            )
        return config

    def tried(self, overrides: Sequence[str]) -> list[Problem]:
        """What would be wrong with this config, its section `tune` aside, under further overrides."""
        found: list[Problem] = []
        entries = {key: node for key, node in self.entries.items() if key != "tune"}
        try:
            _Resolver(with_overrides(replace(self.root, value=entries), overrides, found), found).resolve()
        except ConfigError as error:
            return error.problems
        return []

    def report(self, path: KeyPath, message: str) -> None:
        node = self.root.find(path)
        missing = node is self.root
        key = _dotted(path)
        self.problems.append(Problem(message, key, node.file, 0 if missing else node.line))

    def check(self, section: str, cls: type, node: Node, at: KeyPath) -> dict[str, Any] | None:
        found: list[tuple[KeyPath, str]] = []
        options = check(cls, node, found)
        for path, message in found:
            if message.startswith("unknown key"):
                self.unknown.append((section, (*at, *path)))
            else:
                self.report((*at, *path), message)
        if found:
            self.failed.add(section)
        return options

    def section(self, name: str, cls: type) -> Any:
        """A section as its dataclass; one with defaults where something is wrong."""
        node = self.entries.get(name) or Node({}, self.root.file, 0)
        if not isinstance(node.value, dict):
            self.report((name,), f"got {describe_value(node.plain())}, wanted a mapping")
            self.failed.add(name)
            return cls()
        kinds = [place[-1] for place in PLACES if place[:-1] == (name,)]
        own = replace(node, value={key: child for key, child in node.value.items() if key not in kinds})
        options = self.check(name, _own_fields(cls), own, (name,)) or {}
        # An absent section has all its defaults, those of its components among them.
        named = {kind: self.component((name, kind)) for kind in kinds if kind in node.value}
        return construct(cls, {**options, **named})

    def component(self, place: Place) -> Component | None:
        """The component that is named at `place`, as far as it is right; None for an optional one that is not there."""
        kind = PLACES[place]
        node = _at(self.root, place)
        if kind in OPTIONAL_COMPONENTS and (node is None or node.value is None):
            return None
        nothing = Component(kind, "", {})
        if node is None:
            self.report(place, f"missing: write `{kind}: {{name: ...}}` (`trainer list` shows the names)")
            return nothing
        if not isinstance(node.value, dict):
            self.report(place, f"got {describe_value(node.plain())}, wanted a name, or a mapping with one")
            return nothing
        named = node.value.get("name")
        if named is None:
            self.report(place, "missing: name (`trainer list` shows the names)")
            return nothing
        if not isinstance(named.value, str):
            self.report((*place, "name"), f"got {describe_value(named.plain())}, wanted a name")
            return nothing
        return Component(kind, named.value, self.options(place, named.value, node))

    def options(self, place: Place, name: str, node: Node) -> dict[str, Any]:
        assert isinstance(node.value, dict)
        kind, section = PLACES[place], _dotted(place)
        own = Node({key: child for key, child in node.value.items() if key != "name"}, node.file, node.line)
        try:
            cls = component_fields(kind, name)
            self.keys[section] = ["name", *field_types(cls)]
            options = self.check(section, cls, own, place)
        except ConfigError as error:
            self.problems.extend(error.problems)
            return {}
        except UserError as error:
            self.report((*place, "name"), str(error))
            return {}
        except UnsupportedType as error:
            self.report((*place, "name"), f"{kind} {name}: {error}")
            return {}
        if options is not None:
            self.post_init(place, spec(kind, name), options)
        return options or {}

    def post_init(self, place: Place, found: ComponentSpec, options: dict[str, Any]) -> None:
        """Let the component check itself; `field: ...` in its message names the key."""
        own = field_types(found.config_class)
        try:
            construct(found.config_class, {key: value for key, value in options.items() if key in own})
        except ValueError as error:
            message = str(error)
            key, colon, rest = message.partition(": ")
            if colon and key in own:
                self.report((*place, key), rest)
            else:
                self.report(place, message)
        except Exception as error:  # the component's own fault, to be shown with its section
            self.report(place, f"its Config fails with {type(error).__name__}: {error}")

    def hint(self, section: str, path: KeyPath) -> str:
        key = str(path[-1])
        nested = len(path) > (section.count(".") + 2 if section else 1)
        if "." in key and not section:
            return ": write sections as mappings, dots are for the command line"
        near = "" if nested else did_you_mean(key, self.keys.get(section, []))
        if near:
            return near
        if not section and key == "loading":
            return ": its keys stand in the section 'data'"
        others = sorted(name for name, keys in self.keys.items() if name != section and key in keys)
        if others:
            homes = " and ".join(f"{name}.{key}" if name else f"{key!r} at the top level" for name in others)
            return f", but there is {homes}"
        return "" if nested else f"; there are: {', '.join(self.keys.get(section, []))}"


def as_dict(config: RunConfig) -> dict[str, Any]:
    """The YAML form of a config: what `load` turns into an equal config. Complete with defaults, but for sections that
    most runs have no use for."""
    result: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if item.name != "loading" and not (isinstance(value, UNTOLD) and value == type(value)()):
            result[item.name] = to_plain(value)
    result["data"] = {"name": config.data.name, **asdict(config.loading), **result["data"]}
    return result


def dump(config: RunConfig) -> str:
    """YAML text that `load` turns into an equal config."""
    return yaml.dump(as_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def diff(a: RunConfig, b: RunConfig) -> list[str]:
    """Dotted keys in which two configs differ, sorted. Lists are compared as a whole."""
    left, right = _flat(as_dict(a), ""), _flat(as_dict(b), "")
    missing = object()
    return sorted(key for key in left.keys() | right.keys() if left.get(key, missing) != right.get(key, missing))


def _flat(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {key: value}
    prefix = f"{key}." if key else ""
    return {path: leaf for name, child in value.items() for path, leaf in _flat(child, prefix + name).items()}


def _at(node: Node | None, place: Place) -> Node | None:
    for step in place:
        node = node.value.get(step) if node is not None and isinstance(node.value, dict) else None
    return node


def _dotted(path: KeyPath) -> str:
    return ".".join(str(step) for step in path)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that YAML 1.1 or 1.2 would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", INT, list("-+0123456789"))

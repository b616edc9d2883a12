"""The layers of a config, as trees with their places: defaults, `extends:`, the file, `key=value` overrides.

Each layer is merged onto the ones before. Mappings merge key by key and everything else replaces; an empty mapping
inside a section clears what was there; a section with nothing in it (`train:`) adds nothing. A component section
whose `name` differs from the one below takes over none of the old component's own fields. A bare text
(`model: tiny`) stands for `{name: tiny}`. An entry of `tune.space` replaces the one of the same key as a whole.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import TypeAlias

from trainer.component import KINDS, ROOT
from trainer.config import Loading, RunConfig
from trainer.errors import ConfigError, Problem
from trainer.validation import describe_value, field_types
from trainer.yaml_source import COMMAND_LINE, MAX_DEPTH, Node, parse_scalar, parse_yaml, read_yaml

Place: TypeAlias = tuple[str, ...]
"""The keys on the way to a value, without those of lists."""

CONFIGS = ROOT / "configs"
"""Folder of the configs that ship."""

DEFAULT_COMPONENTS = {
    "optimizer": "adamw",
    "schedule": "constant",
    "strategy": "auto",
    "sampler": "tpe",
    "scheduler": "asha",
}
"""Kind -> the component taken where no layer names one."""

OPTIONAL_COMPONENTS = ("adapter",)
"""Sections that a config can do without; null takes one away that a layer below has."""

SECTIONS: dict[str, type] = {
    name: hint
    for name, hint in field_types(RunConfig).items()
    if isinstance(hint, type) and is_dataclass(hint) and name not in KINDS and name != "loading"
}
"""Sections that name no component -> their dataclass."""

PLACES: dict[Place, str] = {
    **{(kind,): kind for kind in field_types(RunConfig) if kind in KINDS},
    **{(section, kind): kind for section, cls in SECTIONS.items() for kind in field_types(cls) if kind in KINDS},
}
"""Where a config names a component -> its kind."""

_HOLDERS = {place[:-1] for place in PLACES if len(place) > 1}

SPACE: Place = ("tune", "space")
"""The mapping whose keys are themselves dotted keys of a config."""

LOADING_KEYS = tuple(item.name for item in fields(Loading))
"""Keys of the section `data` that every data set shares."""


def read_layers(source: str | Path, overrides: Sequence[str], problems: list[Problem]) -> Node:
    """All layers as one mapping; problems that leave something to check are added to `problems`.

    Raises ConfigError where there is nothing to check: no such file, or one that cannot be parsed.
    """
    return with_overrides(_merge(_defaults(), _read(find_config(source), (), problems, {})), overrides, problems)


def with_overrides(root: Node, overrides: Sequence[str], problems: list[Problem]) -> Node:
    """The layers with `overrides` on top; an override that cannot be read is left out and told in `problems`."""
    for override in overrides:
        layer = _override(override, root, problems)
        if layer is not None:
            root = _merge(root, layer)
    return root


def find_config(name: str | Path, base: Path | None = None) -> Path:
    """The file of a config: a path (from the folder `base`, if given), with or without `.yaml`, else a shipped config.

    Raises ConfigError for a name that is neither.
    """
    text = str(name)
    wanted = Path(text)
    near = wanted if base is None else base / wanted
    try:
        for folder_path in (near, CONFIGS / wanted):
            for candidate in (folder_path, folder_path.with_name(folder_path.name + ".yaml")):
                if candidate.is_file():
                    return candidate
        if near.exists():
            return near
    except (OSError, ValueError) as error:
        raise ConfigError([Problem(f"{text!r} is no path of a config: {error}")]) from error
    names = shipped_configs()
    close = difflib.get_close_matches(text.removesuffix(".yaml"), [name.removesuffix(".yaml") for name in names], n=1)
    hint = f", did you mean {close[0] + '.yaml'!r}?" if close else ""
    shipped = f"; configs that ship: {', '.join(names)}" if names else ""
    raise ConfigError([Problem(f"no config {text!r}: no such file, and none of this name ships{hint}{shipped}")])


def shipped_configs() -> list[str]:
    """Names of the configs that ship, sorted."""
    return sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob("**/*.yaml"))


def _defaults() -> Node:
    root = Node({}, "", 0)
    for place, kind in PLACES.items():
        if kind in DEFAULT_COMPONENTS:
            name = DEFAULT_COMPONENTS[kind]
            root = _merge(root, _nested(place, Node(name, "", 0, name)))
    return root


def _read(path: Path, above: tuple[Path, ...], problems: list[Problem], done: dict[Path, Node]) -> Node:
    """A file merged onto the files it extends. Raises ConfigError where one cannot be read."""
    real = path.resolve()
    if real in done:
        return done[real]
    node = read_yaml(path, problems)
    if node is None or not isinstance(node.value, dict):
        raise ConfigError([problems.pop()])
    bases = node.value.get("extends")
    merged = Node({}, str(path), 1)
    for base in _base_names(bases, problems):
        try:
            base_path = find_config(str(base.value), path.parent)
            if base_path.resolve() in (*above, real):
                raise ConfigError([Problem(f"{base.value} extends this file in turn: a cycle")])
            if len(above) >= MAX_DEPTH:
                raise ConfigError([Problem(f"more than {MAX_DEPTH} files extend one another")])
            merged = _merge(merged, _read(base_path, (*above, real), problems, done))
        except ConfigError as error:
            raise ConfigError([_at(problem, "extends", base) for problem in error.problems]) from error
    own = replace(node, value={key: child for key, child in node.value.items() if key != "extends"})
    done[real] = _merge(merged, own)
    return done[real]


def _base_names(node: Node | None, problems: list[Problem]) -> Iterator[Node]:
    if node is None:
        return
    for item in node.value if isinstance(node.value, list) else [node]:
        if isinstance(item.value, str) and item.value:
            yield item
        else:
            message = f"got {describe_value(item.plain())}, wanted the name of a config or a list of names"
            problems.append(Problem(message, "extends", item.file, item.line))


def _at(problem: Problem, key: str, node: Node) -> Problem:
    return problem if problem.file else replace(problem, key=key, file=node.file, line=node.line)


def _merge(below: Node, above: Node, at: Place = ()) -> Node:
    """A mapping of sections with another layer on it: the root of a config, or a section that holds components."""
    assert isinstance(below.value, dict) and isinstance(above.value, dict)
    merged = dict(below.value)
    for key, node in above.value.items():
        old = merged.get(key)
        place = (*at, key)
        kind = PLACES.get(place)
        if kind is not None:
            node = _longhand(node)
            if old is not None and _renames(old, node):
                assert isinstance(old.value, dict)
                kept = {name: child for name, child in old.value.items() if kind == "data" and name in LOADING_KEYS}
                old = replace(old, value=kept)
        is_section = kind is not None or (not at and key in SECTIONS)
        if node.value is None and is_section and kind not in OPTIONAL_COMPONENTS:
            node = replace(node, value={})
        if place in _HOLDERS and isinstance(node.value, dict):
            whole = old if old is not None and isinstance(old.value, dict) else replace(node, value={})
            merged[key] = _merge(whole, node, place)
        elif place == SPACE:
            merged[key] = _merge_space(old, node)
        else:
            merged[key] = _merge_value(old, node, is_section)
    return _placed(merged, below, above)


def _merge_space(below: Node | None, above: Node) -> Node:
    """Entry by entry: half of one range beside half of another would be neither; null takes an entry away."""
    if not isinstance(above.value, dict) or not above.value:
        return above
    old = below.value if below is not None and isinstance(below.value, dict) else {}
    merged = {key: node for key, node in {**old, **above.value}.items() if node.value is not None}
    return _placed(merged, above if below is None else below, above)


def _merge_value(below: Node | None, above: Node, is_section: bool = False) -> Node:
    if below is None or not isinstance(below.value, dict) or not isinstance(above.value, dict):
        return above
    if not above.value and not is_section:
        return above
    merged = dict(below.value)
    for key, node in above.value.items():
        merged[key] = _merge_value(merged.get(key), node)
    return _placed(merged, below, above)


def _placed(value: dict[str, Node], below: Node, above: Node) -> Node:
    # Where a file says something too, it is the better place to look for what is missing.
    return replace(below if above.file == COMMAND_LINE and below.file else above, value=value)


def _longhand(node: Node) -> Node:
    return replace(node, value={"name": node}, text=None) if isinstance(node.value, str) else node


def _renames(below: Node, above: Node) -> bool:
    if not isinstance(below.value, dict) or not isinstance(above.value, dict):
        return False
    old, new = below.value.get("name"), above.value.get("name")
    return new is not None and (old is None or old.value != new.value)


def _override(text: str, root: Node, problems: list[Problem]) -> Node | None:
    """One `key=value` as a layer of its own."""
    key, equals, written = text.partition("=")
    parts = key.split(".")
    if tuple(parts[: len(SPACE)]) == SPACE and len(parts) > len(SPACE) and all(parts):
        parts[len(SPACE) :] = [".".join(parts[len(SPACE) :])]
    if not equals or not all(parts) or key != key.strip() or len(parts) > MAX_DEPTH:
        shown = text if len(text) <= 60 else text[:57] + "..."
        problems.append(Problem(f"{shown!r} is no override: write dotted.key=value", file=COMMAND_LINE))
        return None
    if parts[0] == "extends":
        problems.append(Problem("belongs in a file: an override sets one value", key, COMMAND_LINE))
        return None
    node = _override_value(key, written, problems)
    if node is None:
        return None
    at: Node | None = root
    for depth, part in enumerate(parts[:-1], 1):
        at = at.value.get(part) if at is not None and isinstance(at.value, dict) else None
        if at is not None and isinstance(at.value, list):
            message = f"{'.'.join(parts[:depth])} is a list: give the whole list, as in {'.'.join(parts[:depth])}=[...]"
            problems.append(Problem(message, key, COMMAND_LINE))
            return None
    return _nested(tuple(parts), node)


def _nested(place: Place, node: Node) -> Node:
    for part in reversed(place):
        node = Node({part: node}, node.file, 0)
    return node


def _override_value(key: str, written: str, problems: list[Problem]) -> Node | None:
    found: list[Problem] = []
    node: Node | None
    if written.lstrip()[:1] in ("{", "[", '"', "'"):
        node = parse_yaml(written, COMMAND_LINE, found)
    elif not written.isprintable():
        found.append(Problem("holds a character that cannot be printed"))
        node = None
    else:
        try:
            value = parse_scalar(written.strip()) if written else ""
            node = Node(value, COMMAND_LINE, 0, written.strip())
        except ValueError as error:
            found.append(Problem(str(error)))
            node = None
    problems.extend(Problem(problem.message, key, COMMAND_LINE) for problem in found)
    return None if found or node is None else _without_lines(node)


def _without_lines(node: Node) -> Node:
    value = node.value
    if isinstance(value, dict):
        value = {key: _without_lines(child) for key, child in value.items()}
    elif isinstance(value, list):
        value = [_without_lines(child) for child in value]
    return replace(node, value=value, line=0)

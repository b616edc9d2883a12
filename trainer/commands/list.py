"""Show what a config can name: components with their keys, and the configs that ship.

trainer list              everything, by name
trainer list models       every model with its keys
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from trainer import config
from trainer.component import KINDS, available, spec
from trainer.component_source import read_help
from trainer.config import Loading
from trainer.errors import EXIT_DONE
from trainer.layers import CONFIGS, shipped_configs
from trainer.validation import default_of, describe, field_types

TOPICS = {
    "recipes": "recipe",
    "models": "model",
    "data": "data",
    "optimizers": "optimizer",
    "schedules": "schedule",
    "strategies": "strategy",
    "adapters": "adapter",
    "samplers": "sampler",
    "schedulers": "scheduler",
}
WIDTH = 110


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument(
        "topic", nargs="?", choices=[*TOPICS, "configs"], metavar="topic", help=", ".join([*TOPICS, "configs"])
    )


def run(args: argparse.Namespace) -> int:
    """Print one topic in full, or all by name."""
    topics = [args.topic] if args.topic else [*TOPICS, "configs"]
    entries = {topic: _configs() if topic == "configs" else _components(TOPICS[topic]) for topic in topics}
    if args.json:
        print(json.dumps(entries, indent=2))
    elif args.topic:
        print("\n".join(_full(args.topic, entries[args.topic])))
    else:
        print("\n".join(_overview(entries)))
    return EXIT_DONE


def _components(kind: str) -> list[dict[str, Any]]:
    assert set(TOPICS.values()) == set(KINDS)
    shared = _shared() if kind == "data" else []
    entries = []
    for name in available(kind):
        found = spec(kind, name)
        own = _fields(found.config_class, found.help_by_field)
        entries.append({"name": name, "help": found.doc, "fields": own + shared})
    return entries


def _shared() -> list[dict[str, Any]]:
    assert config.__file__ is not None
    return _fields(Loading, read_help(Path(config.__file__))["Loading"][1])


def _fields(cls: type, help_by_field: dict[str, str]) -> list[dict[str, Any]]:
    rows = []
    types = field_types(cls)
    for item in fields(cls):
        default = default_of(item)
        row = {"name": item.name, "type": describe(types[item.name]), "required": default is MISSING}
        if default is not MISSING:
            row["default"] = default
        rows.append({**row, "help": help_by_field.get(item.name, "")})
    return rows


def _configs() -> list[dict[str, Any]]:
    return [{"name": name, "help": _first_comment(CONFIGS / name)} for name in shipped_configs()]


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _overview(entries: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    for topic, rows in entries.items():
        yield topic
        width = max((len(row["name"]) for row in rows), default=0)
        for row in rows:
            yield _line(row, width)
        if not rows:
            yield "  none"
        yield ""
    yield "`trainer list models` shows the keys of every model; a component of your own is named by its module,"
    yield "as in `model: {name: mypackage.nets.tiny}`."


def _line(row: dict[str, Any], width: int) -> str:
    return f"  {row['name']:<{width}}  {textwrap.shorten(row['help'], WIDTH - width, placeholder=' ...')}".rstrip()


def _full(topic: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    if not rows:
        yield f"no {topic} yet"
    shared = {row["name"] for row in _shared()} if topic == "data" else set()
    for row in rows:
        yield row["name"]
        yield from textwrap.wrap(row["help"], WIDTH, initial_indent="  ", subsequent_indent="  ")
        yield from _table([item for item in row.get("fields", []) if item["name"] not in shared])
        yield ""
    if shared:
        yield "every data set"
        yield from _table(_shared())


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    names = [row["name"] for row in rows]
    values = ["required" if row["required"] else json.dumps(row["default"]) for row in rows]
    left = max((len(name) for name in names), default=0)
    middle = min(max((len(value) for value in values), default=0), 24)
    for row, value in zip(rows, values, strict=True):
        yield f"  {row['name']:<{left}}  {value:<{middle}}  {row['type']}"
        yield from textwrap.wrap(row["help"], WIDTH, initial_indent="      ", subsequent_indent="      ")

"""YAML as a tree that remembers where each key and value was written.

Scalars follow the core schema of YAML 1.2: only `true` and `false` are booleans (`yes`, `no`, `on`, `off`
stay text), `1e-3` is a number, `1:30` and `2024-01-01` are text. Whatever is wrong becomes a `Problem`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from yaml import events as ev

from trainer.errors import Problem

MAX_BYTES = 1_000_000
MAX_DEPTH = 50
MAX_NODES = 100_000
MAX_DIGITS = 1_000
COMMAND_LINE = "command line"

INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_TAG = "tag:yaml.org,2002:"

Scalar: TypeAlias = str | int | float | bool | None


@dataclass(frozen=True)
class Node:
    """A value with its place. Nodes are shared, never changed."""

    value: dict[str, Node] | list[Node] | Scalar
    file: str
    line: int
    """1-based line of the value's key, or of the value where it has none; 0 for the command line."""
    text: str | None = None
    """What was written, for a scalar."""

    @cached_property
    def size(self) -> int:
        """Number of nodes when every alias is written out."""
        return 1 + sum(child.size for child in self.children())

    @cached_property
    def depth(self) -> int:
        """Levels of nesting when every alias is written out."""
        return 1 + max((child.depth for child in self.children()), default=0)

    def children(self) -> Iterator[Node]:
        """The nodes one level below."""
        if isinstance(self.value, dict):
            yield from self.value.values()
        elif isinstance(self.value, list):
            yield from self.value

    def plain(self) -> Any:
        """The value as dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def find(self, path: tuple[str | int, ...]) -> Node:
        """The node at `path`, or the deepest one on the way there."""
        node = self
        for step in path:
            if isinstance(node.value, dict) and step in node.value:
                node = node.value[str(step)]
            elif isinstance(node.value, list) and isinstance(step, int) and step < len(node.value):
                node = node.value[step]
            else:
                break
        return node


def read_yaml(path: Path, problems: list[Problem]) -> Node | None:
    """Read a file whose top level is a mapping; None, with the reason in `problems`, where there is none."""
    file = str(path)
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            problems.append(Problem(f"larger than {MAX_BYTES} bytes: this is no config", file=file))
            return None
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        problems.append(Problem("not UTF-8: save the file in this encoding", file=file, line=line))
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        problems.append(Problem(f"cannot be read: {reason}", file=file))
        return None
    before = len(problems)
    node = parse_yaml(text, file, problems)
    if node is None:
        if len(problems) == before:
            problems.append(Problem("the file is empty", file=file))
        return None
    if not isinstance(node.value, dict):
        problems.append(Problem("the top level must be a mapping (`key: value` lines)", file=file, line=node.line))
        return None
    return node


def parse_yaml(text: str, file: str, problems: list[Problem]) -> Node | None:
    """Parse one document; None where it is empty or, with the reason in `problems`, cannot be parsed."""
    forbidden = _FORBIDDEN.search(text)
    if forbidden:
        line = text.count("\n", 0, forbidden.start()) + 1
        problems.append(Problem(f"character U+{ord(forbidden[0]):04X} is not allowed in YAML", file=file, line=line))
        return None
    composer = _Composer(text, file)
    try:
        node = composer.document()
    except _Fatal as error:
        problems.append(error.problem)
        return None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        said = " ".join(str(getattr(error, "problem", None) or error).split())
        # PyYAML has a limit of its own since 6.0.4, which some texts meet before they meet ours.
        is_deep = "maximum nesting depth" in said
        message = f"nested more than {MAX_DEPTH} levels deep" if is_deep else f"YAML syntax: {said}"
        problems.append(Problem(message, file=file, line=mark.line + 1 if mark else 0))
        return None
    problems.extend(composer.problems)
    return node


def parse_scalar(text: str) -> Scalar:
    """The value of a scalar written without quotes. Raises ValueError for a number that cannot be held."""
    if text in WORDS:
        return WORDS[text]
    if len(text) > MAX_DIGITS and (INT.fullmatch(text) or FLOAT.fullmatch(text)):
        raise ValueError(f"a number of more than {MAX_DIGITS} digits")
    if INT.fullmatch(text):
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if NOT_FINITE.fullmatch(text):
        raise ValueError("not a finite number")
    if FLOAT.fullmatch(text):
        number = float(text)
        if not math.isfinite(number):
            raise ValueError("too large for a number")
        return number
    return text


class _Fatal(Exception):
    def __init__(self, message: str, file: str, line: int) -> None:
        self.problem = Problem(message, file=file, line=line)
        super().__init__(message)


class _Composer:
    """From parser events to nodes; depth and size are limited before anything is expanded."""

    def __init__(self, text: str, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self.anchors: dict[str, Node | None] = {}
        loader = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
        self.events: Iterator[Any] = yaml.parse(text, Loader=loader)

    def document(self) -> Node | None:
        next(self.events)  # stream start
        if isinstance(next(self.events), ev.StreamEndEvent):
            return None
        event = next(self.events)
        if isinstance(event, ev.ScalarEvent) and event.value == "" and event.implicit[0] and not event.anchor:
            node = None
        else:
            node = self.node(event, 1)
        next(self.events)  # document end
        extra = next(self.events)
        if not isinstance(extra, ev.StreamEndEvent):
            raise _Fatal("a second document (`---`) in the file: one config per file", self.file, _line(extra))
        return node

    def node(self, event: Any, depth: int) -> Node:
        line = _line(event)
        if isinstance(event, ev.AliasEvent):
            return self.alias(event, depth)
        if depth > MAX_DEPTH:
            raise _Fatal(f"nested more than {MAX_DEPTH} levels deep", self.file, line)
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        if isinstance(event, ev.ScalarEvent):
            node = self.scalar(event, line)
        elif isinstance(event, ev.SequenceStartEvent):
            self.check_tag(event, "seq", line)
            node = Node(list(self.items(depth)), self.file, line)
        else:
            self.check_tag(event, "map", line)
            node = Node(self.mapping(depth), self.file, line)
        if node.size > MAX_NODES:
            raise _Fatal(f"more than {MAX_NODES} values once the aliases are written out", self.file, line)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def alias(self, event: Any, depth: int) -> Node:
        line = _line(event)
        if event.anchor not in self.anchors:
            raise _Fatal(f"alias *{event.anchor} has no anchor &{event.anchor} above it", self.file, line)
        node = self.anchors[event.anchor]
        if node is None:
            raise _Fatal(f"alias *{event.anchor} stands inside its own anchor", self.file, line)
        if depth + node.depth > MAX_DEPTH:
            raise _Fatal(f"nested more than {MAX_DEPTH} levels deep", self.file, line)
        return replace(node, line=line)

    def items(self, depth: int) -> Iterator[Node]:
        while not isinstance(event := next(self.events), ev.SequenceEndEvent):
            yield self.node(event, depth + 1)

    def mapping(self, depth: int) -> dict[str, Node]:
        own: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        while not isinstance(event := next(self.events), ev.MappingEndEvent):
            line = _line(event)
            key = self.node(event, depth + 1)
            value = self.node(next(self.events), depth + 1)
            if isinstance(event, ev.ScalarEvent) and event.value == "<<" and event.implicit[0]:
                for name, node in self.merge_key(value, line).items():
                    merged.setdefault(name, node)
            elif not isinstance(key.value, str):
                what = f"`{key.text}`" if key.text is not None else "a list or a mapping"
                self.problem(f"{what} is no text and cannot be a key: put it in quotes", line)
            elif key.value in own:
                self.problem(f"written twice in one mapping (first in line {own[key.value].line})", line, key.value)
            else:
                own[key.value] = replace(value, line=line)
        return merged | own

    def merge_key(self, value: Node, line: int) -> dict[str, Node]:
        sources = value.value if isinstance(value.value, list) else [value]
        merged: dict[str, Node] = {}
        for source in sources:
            if not isinstance(source.value, dict):
                self.problem("`<<` takes a mapping or a list of mappings", line)
                return {}
            merged = source.value | merged
        return merged

    def scalar(self, event: Any, line: int) -> Node:
        text: str = event.value
        if _SURROGATE.search(text):
            self.problem("half of a surrogate pair in the text", line)
            return Node("", self.file, line, "")
        if not event.implicit[0]:
            self.check_tag(event, "str", line)
            return Node(text, self.file, line, text)
        try:
            return Node(parse_scalar(text), self.file, line, text)
        except ValueError as error:
            self.problem(f"{_short(text)}: {error}", line)
            return Node(None, self.file, line, text)

    def check_tag(self, event: Any, kind: str, line: int) -> None:
        if event.tag not in (None, "!", _TAG + kind):
            tag = event.tag.replace(_TAG, "!!")
            self.problem(f"tag {_short(tag)} is not allowed: a config holds plain values only", line)

    def problem(self, message: str, line: int, key: str = "") -> None:
        self.problems.append(Problem(message, key, self.file, line))


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."

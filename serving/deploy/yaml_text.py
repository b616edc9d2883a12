"""Data to YAML as people write it: block style, keys in the order given, long texts as blocks, a comment on top."""

from __future__ import annotations

import re
from typing import Any

import yaml

WIDTH = 120
NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
"""What YAML 1.2 reads as one."""


class _Dumper(yaml.SafeDumper):
    """Without anchors: a part that is used twice is written twice, so that each can be changed alone."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # `12e34` is text for PyYAML and a number for Go's readers; a version can be that.
    style = "|" if "\n" in text else "'" if NUMBER.fullmatch(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _block)


def yaml_text(about: str, *documents: dict[str, Any]) -> str:
    """The documents as one YAML file that begins with `about` as a comment."""
    parts = [
        yaml.dump(document, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=WIDTH, allow_unicode=True)
        for document in documents
    ]
    return comment(about) + "---\n".join(parts)


def comment(text: str) -> str:
    """Every line of `text` as a comment."""
    return "".join(f"# {line}".rstrip() + "\n" for line in text.strip().splitlines())

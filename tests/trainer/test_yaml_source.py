"""YAML with places: YAML 1.2 scalars, and a Problem for whatever is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.errors import Problem
from trainer.yaml_source import MAX_BYTES, MAX_DEPTH, parse_scalar, parse_yaml, read_yaml


def parse(text: str) -> Any:
    problems: list[Problem] = []
    node = parse_yaml(text, "f.yaml", problems)
    assert problems == []
    assert node is not None
    return node.plain()


def problems_of(text: str) -> list[str]:
    problems: list[Problem] = []
    parse_yaml(text, "f.yaml", problems)
    assert all(problem.file == "f.yaml" for problem in problems)
    return [str(problem) for problem in problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("5.0e-5", 5e-5),
        (".5", 0.5),
        ("1.", 1.0),
        ("-3", -3),
        ("+4", 4),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        *[
            (word, word)
            for word in ("yes", "no", "on", "off", "y", "N", "1:30", "2024-01-01", "1_000", "nan", "inf", "-")
        ],
    ],
)
def test_plain_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    found = parse_scalar(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", [".nan", ".inf", "-.Inf", "1e400", "9" * 5000, "0x" + "f" * 5000])
def test_numbers_that_cannot_be_held(text: str) -> None:
    with pytest.raises(ValueError, match=r"finite|too large|digits"):
        parse_scalar(text)
    assert problems_of(f"a: {text}")[0].startswith("f.yaml:1: ")


def test_quotes_and_str_tag_keep_text() -> None:
    assert parse("a: '1'\nb: \"true\"\nc: !!str 5\ne: |\n  1\n") == {
        "a": "1",
        "b": "true",
        "c": "5",
        "e": "1\n",
    }


def test_scalar_keeps_what_was_written() -> None:
    node = parse_yaml("precision: 32\nlr: 1e-3", "f.yaml", [])
    assert node is not None
    assert node.find(("precision",)).text == "32"
    assert node.find(("lr",)).text == "1e-3"


def test_lines_are_those_of_keys_and_items() -> None:
    node = parse_yaml("# c\na:\n  b: 1\n  c:\n    - x\n    - y: 2\nd: {e: 1,\n  f: 2}\n", "f.yaml", [])
    assert node is not None
    lines = {path: node.find(path).line for path in [("a",), ("a", "b"), ("a", "c"), ("a", "c", 1), ("d", "f")]}
    assert lines == {("a",): 2, ("a", "b"): 3, ("a", "c"): 4, ("a", "c", 1): 6, ("d", "f"): 8}
    assert node.find(("a", "zzz", "b")).line == 2, "the deepest node on the way"
    assert node.find(("a", "c", 9)).line == 4


def test_anchors_and_merge_keys() -> None:
    text = """
base: &base {lr: 1, momentum: 2}
more: &more {lr: 5, eps: 3}
one: {<<: *base, lr: 9}
two: {<<: [*base, *more]}
alias: *base
"""
    found = parse(text)
    assert found["one"] == {"lr": 9, "momentum": 2}
    assert found["two"] == {"lr": 1, "momentum": 2, "eps": 3}
    assert found["alias"] == {"lr": 1, "momentum": 2}
    node = parse_yaml(text, "f.yaml", [])
    assert node is not None
    assert node.find(("alias",)).line == 6
    assert node.find(("alias", "lr")).line == 2, "a key is where it was written"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3", "f.yaml:3: a: written twice in one mapping (first in line 1)"),
        ("1: x", "f.yaml:1: `1` is no text and cannot be a key: put it in quotes"),
        ("true: x", "f.yaml:1: `true` is no text"),
        ("[a, b]: x", "f.yaml:1: a list or a mapping is no text"),
        ("a: !!python/object:os.system x", "f.yaml:1: tag !!python/object:os.system is not allowed"),
        ("a: !!python/object/apply:os.system [x]", "f.yaml:1: tag !!python/object/apply:os.system is not allowed"),
        ("a: !!set {x}", "f.yaml:1: tag !!set is not allowed"),
        ("a: !mine x", "f.yaml:1: tag !mine is not allowed"),
        ("a: !!int 5", "f.yaml:1: tag !!int is not allowed"),
        ("<<: 3", "f.yaml:1: `<<` takes a mapping"),
        ("<<: [3]", "f.yaml:1: `<<` takes a mapping"),
        ("a: 1\nb: [1, 2", "f.yaml:3: YAML syntax: did not find expected ',' or ']'"),
        ("a:\n\t- b", "f.yaml:2: YAML syntax: found character that cannot start any token"),
        ("a: b: c", "f.yaml:1: YAML syntax: mapping values are not allowed"),
        ("a: *nothing", "f.yaml:1: alias *nothing has no anchor"),
        ("a: &a [*a]", "f.yaml:1: alias *a stands inside its own anchor"),
        ("a: 1\n---\nb: 2", "f.yaml:2: a second document"),
        ("a: \x00", "f.yaml:1: character U+0000 is not allowed"),
        ("a: 1\nb: \x1b", "f.yaml:2: character U+001B is not allowed"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "f.yaml:1: nested more than"),
        ("[" * 20000, "f.yaml:1: nested more than"),
    ],
)
def test_problems(text: str, expected: str) -> None:
    found = problems_of(text)
    assert len(found) == 1
    assert expected in found[0]


def test_problems_of_one_file_come_together() -> None:
    assert len(problems_of("a: 1\na: 2\n3: x\nb: !!set {}\nc: .nan\n")) == 4


def test_billion_laughs_is_refused_quickly() -> None:
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    (found,) = problems_of("\n".join(lines))
    assert "once the aliases are written out" in found


def test_nesting_by_aliases_is_refused() -> None:
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 2 * MAX_DEPTH)]
    assert "nested more than" in problems_of("\n".join(lines))[0]


def read(path: Path) -> str:
    problems: list[Problem] = []
    assert read_yaml(path, problems) is None
    (problem,) = problems
    assert problem.file == str(path)
    return str(problem).removeprefix(str(path))


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", ": the file is empty"),
        (b"# only a comment\n", ": the file is empty"),
        (b"---\n", ": the file is empty"),
        (b"a: 1\nb: \xff\xfe\n", ":2: not UTF-8: save the file in this encoding"),
        (b"- a\n- b\n", ":1: the top level must be a mapping (`key: value` lines)"),
        (b"text", ":1: the top level must be a mapping (`key: value` lines)"),
        (b"a: \x00\n", ":1: character U+0000 is not allowed in YAML"),
        (b"a: [\n", ":2: YAML syntax: "),
        (b"a: 1\n" * (MAX_BYTES // 5 + 1), f": larger than {MAX_BYTES} bytes: this is no config"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, raw: bytes, expected: str) -> None:
    path = tmp_path / "f.yaml"
    path.write_bytes(raw)
    assert read(path).startswith(expected)


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    assert read(tmp_path) == ": cannot be read: Is a directory"
    assert read(tmp_path / "missing.yaml") == ": cannot be read: No such file or directory"
    problems: list[Problem] = []
    assert read_yaml(Path("a\x00b"), problems) is None
    assert "cannot be read" in problems[0].message


def test_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    node = read_yaml(path, [])
    assert node is not None
    assert node.plain() == {"a": 1}


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(st.binary(max_size=200), st.text(alphabet="ab01:-[]{}&*!<\"'|>#%?,. \n\té~", max_size=80).map(str.encode))
)
def test_any_bytes_give_a_mapping_or_a_problem(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(raw)
    problems: list[Problem] = []
    node = read_yaml(path, problems)
    if node is None:
        assert problems
    else:
        assert isinstance(node.plain(), dict)


TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=0xD7FF, exclude_categories=["Cc", "Cs"]), max_size=8)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(TEXT, PLAIN, min_size=1, max_size=3))
def test_json_is_read_as_it_is(data: dict[str, Any]) -> None:
    assert parse(json.dumps(data, ensure_ascii=False)) == data


def test_pure_python_parser_reads_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a: &x {b: [1, '2', 1e-3]}\nc: *x\nd: |\n  t\n"
    with_c = parse(text)
    monkeypatch.setattr(yaml, "__with_libyaml__", False)
    assert parse(text) == with_c
    assert "surrogate" in problems_of('a: "\\ud800"')[0]
    assert len(problems_of("a: [1, 2")) == 1

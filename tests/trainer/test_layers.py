"""Overrides, `extends:`, and where configs are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from config_cases import BASE, failures, given_config, write_parts

from trainer import layers
from trainer.errors import ConfigError
from trainer.load import find_config, load, shipped_configs


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_parts(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_overrides_change_create_and_win() -> None:
    config = load(
        "base.yaml",
        [
            "train.max_epochs=3",
            "tracking.tags.team=vision",
            "seed=1",
            "seed=2",
            "model.names=[a, 'b: c']",
            "optimizer.lr=1e-2",
        ],
    )
    assert (config.train.max_epochs, config.seed) == (3, 2)
    assert config.tracking.tags == {"team": "vision"}
    assert config.model.options["names"] == ["a", "b: c"]
    assert config.optimizer.options["lr"] == 0.01


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("x", "x"),
        ("", ""),
        ("null", None),
        (" 3 ", 3),
        ("'3'", "3"),
        ('"a\\tb"', "a\tb"),
        ("a=b", "a=b"),
        ("a # b: c", "a # b: c"),
        ("*x", "*x"),
        ("- a", "- a"),
        ("layer\\.[0-9]", "layer\\.[0-9]"),
        ("{a: [1, yes]}", {"a": [1, "yes"]}),
        ("!!set", "!!set"),
    ],
)
def test_values_of_overrides(written: str, value: Any) -> None:
    assert load("base.yaml", [f"model.anything={written}"]).model.options["anything"] == value


def test_mappings_merge_and_an_empty_one_clears() -> None:
    text = BASE + "tracking: {tags: {a: x, b: y}}\n"
    assert given_config(text, "tracking.tags={b: z}").tracking.tags == {"a": "x", "b": "z"}
    assert given_config(text, "tracking.tags={}").tracking.tags == {}
    assert given_config(text, "tracking={}").tracking.tags == {"a": "x", "b": "y"}


def test_another_component_takes_over_nothing_but_loading() -> None:
    text = BASE.replace("parts.part}", "parts.part, act: gelu, width: 3}")
    for override in ("model.name=parts.other", "model=parts.other", "model={name: parts.other}"):
        config = given_config(text, override)
        assert (config.model.name, config.model.options["act"], config.model.options["width"]) == (
            "parts.other",
            "tanh",
            8,
        )
    assert given_config(text, "model=parts.part").model.options["width"] == 3
    assert given_config(text, "model.depth=4", "model.name=parts.other").model.options["depth"] == 1
    assert given_config(text, "model.name=parts.other", "model.depth=4").model.options["depth"] == 4
    config = given_config(text, "data.name=parts.part", "data.width=2")
    assert (config.loading.batch_size, config.data.options["width"]) == (4, 2)
    assert "path" not in config.data.options


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "command line: 'seed' is no override: write dotted.key=value"),
        ("=3", "command line: '=3' is no override"),
        ("a..b=3", "command line: 'a..b=3' is no override"),
        (" seed=3", "command line: ' seed=3' is no override"),
        ("seed=-1", "command line: seed: got -1, wanted a whole number >= 0"),
        ("seed=", "command line: seed: got the text '', wanted a whole number >= 0"),
        ("sed=1", "command line: sed: unknown key 'sed', did you mean 'seed'?"),
        ("train=3", "command line: train: got 3, wanted a mapping"),
        ("model=3", "command line: model: got 3, wanted a name, or a mapping with one"),
        ("seed.x=3", "command line: seed: got a mapping, wanted a whole number >= 0"),
        (
            "model.names.0=a",
            "command line: model.names.0: model.names is a list: give the whole list, as in model.names=[...]",
        ),
        ("train.max_steps=[1", "command line: train.max_steps: YAML syntax: did not find expected ',' or ']'"),
        ("model.anything={a: 1, a: 2}", "command line: model.anything: written twice in one mapping"),
        ("model.anything=\x1b", "command line: model.anything: holds a character that cannot be printed"),
        ("model.anything='\x1b'", "command line: model.anything: character U+001B is not allowed in YAML"),
        ("model.anything=\udcff", "command line: model.anything: holds a character that cannot be printed"),
        ("model.anything=.nan", "command line: model.anything: not a finite number"),
        (".".join("a" * 60) + "=1", "command line: 'a.a.a"),
        ("extends=base", "command line: extends: belongs in a file"),
    ],
)
def test_problems_of_overrides(override: str, expected: str) -> None:
    text = BASE.replace("parts.part}", "parts.part, names: [x]}")
    (line,) = failures(text, override)
    assert line.startswith(expected)


def test_what_is_missing_is_reported_in_the_file_though_an_override_touched_the_section() -> None:
    text = BASE.replace("  path: here\n", "")
    assert failures(text, "data.batch_size=2", "seed=1") == ["c.yaml:4: data.path: missing: wants text"]


def test_extends_merges_deeply(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "mid.yaml").write_text("extends: ../base\nseed: 5\nmodel: {width: 3}\ntracking: {tags: {a: x}}\n")
    (folder / "more.yaml").write_text("model: {act: gelu}\nseed: 6\n")
    config = given_config("extends: [sub/mid.yaml, more]\nmodel: {size: [5, 6]}\ntracking: {tags: {b: y}}\n")
    options = config.model.options
    assert (options["width"], options["act"], options["size"]) == (3, "gelu", [5, 6])
    assert (config.name, config.seed) == ("test", 6)
    assert config.tracking.tags == {"a": "x", "b": "y"}
    assert failures("extends: sub/mid.yaml\nmodel: {width: 0}\n") == [
        "c.yaml:2: model.width: got 0, wanted a whole number >= 1"
    ]


def test_a_problem_of_a_base_is_reported_there(folder: Path) -> None:
    (folder / "bad.yaml").write_text(BASE + "\nseed: x\n")
    problem = "bad.yaml:10: seed: got the text 'x', wanted a whole number >= 0 and <= 9223372036854775807"
    assert failures("extends: bad\n") == [problem]


def test_extending_with_another_component(folder: Path) -> None:
    (folder / "mid.yaml").write_text(BASE.replace("parts.part}", "parts.part, act: gelu}"))
    config = given_config("extends: mid\nmodel: parts.other\ndata: {name: parts.part}\n")
    assert config.model.options["act"] == "tanh"
    assert config.loading.batch_size == 4


def test_a_base_shared_by_two_is_no_cycle(folder: Path) -> None:
    (folder / "a.yaml").write_text("extends: base\nseed: 1\n")
    (folder / "b.yaml").write_text("extends: base\ntrain: {max_steps: 7}\n")
    config = given_config("extends: [a, b]\n")
    assert (config.seed, config.train.max_steps) == (1, 7)


def test_problems_of_extends(folder: Path) -> None:
    (folder / "loop.yaml").write_text("seed: 1\nextends: c.yaml\n")
    assert failures("extends: loop\n") == ["loop.yaml:2: extends: c.yaml extends this file in turn: a cycle"]
    assert "cycle" in failures("extends: c\n")[0]
    (line,) = failures("name: x\nextends: nothing-like-it\n")
    assert line.startswith("c.yaml:2: extends: no config 'nothing-like-it'")
    (line,) = failures("extends: [3]\n" + BASE)
    assert line == "c.yaml:1: extends: got 3, wanted the name of a config or a list of names"
    (line,) = failures("extends: {a: 1}\n" + BASE)
    assert line == "c.yaml:1: extends: got a mapping, wanted the name of a config or a list of names"


def test_a_chain_without_end_is_refused(folder: Path) -> None:
    for level in range(60):
        (folder / f"l{level}.yaml").write_text(f"extends: l{level + 1}\n")
    with pytest.raises(ConfigError, match="more than 50 files extend one another"):
        load("l0")


def test_many_layers_that_extend_twice_are_quick(folder: Path) -> None:
    for level in range(40):
        (folder / f"l{level}.yaml").write_text(f"extends: [l{level + 1}, l{level + 1}]\n" if level < 39 else BASE)
    assert load("l0").name == "test"


def test_find_config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = folder / "shipped"
    (shipped / "hardware").mkdir(parents=True)
    (shipped / "base.yaml").write_text("")
    (shipped / "small.yaml").write_text("")
    (shipped / "hardware" / "big.yaml").write_text("")
    monkeypatch.setattr(layers, "CONFIGS", shipped)
    assert find_config("base").samefile(folder / "base.yaml"), "a path goes first"
    assert find_config("small.yaml") == find_config("small") == shipped / "small.yaml"
    assert find_config("hardware/big") == shipped / "hardware" / "big.yaml"
    assert find_config(folder / "base.yaml") == folder / "base.yaml"
    assert find_config("base", base=shipped) == shipped / "base.yaml"
    assert shipped_configs() == ["base.yaml", "hardware/big.yaml", "small.yaml"]
    with pytest.raises(ConfigError, match=r"did you mean 'small\.yaml'\?; configs that ship: base\.yaml, hardware"):
        find_config("smal")
    with pytest.raises(ConfigError, match="Is a directory"):
        load("shipped")
    for name in ("a\x00b", "x" * 5000):
        with pytest.raises(ConfigError):
            find_config(name)

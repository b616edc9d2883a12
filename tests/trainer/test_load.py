"""The loader: layers, checks with their places, and the way back to YAML."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer import layers
from trainer.component import KINDS
from trainer.config import RunConfig
from trainer.config_rules import cross_check
from trainer.errors import ConfigError
from trainer.load import as_dict, component_fields, diff, dump, find_config, load, shipped_configs

PART = '''
"""A part for tests."""
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

@dataclass(frozen=True)
class Inner:
    """Nested."""
    rate: Annotated[float, "> 0", "< 1"] = 0.5

@dataclass(frozen=True)
class Config:
    """Options."""
    width: Annotated[int, ">= 1"] = 8
    act: Literal["relu", "gelu", "32", "true"] = "relu"
    size: tuple[int, int] = (2, 3)
    inner: Inner = field(default_factory=Inner)
    names: list[str] = field(default_factory=list)
    table: dict[str, float] = field(default_factory=dict)
    either: int | list[int] | None = None
    steps: tuple[Literal["a", "1"], ...] = ()
    anything: Any = None

    def __post_init__(self):
        if self.width == 13:
            raise ValueError("width: 13 brings bad luck")
        if self.width == 14:
            raise ValueError("no good: at all")
        if self.width == 15:
            raise KeyError("bug")

def build(config):
    return config
'''
OTHER = PART.replace('"relu", "gelu", "32", "true"] = "relu"', '"tanh"] = "tanh"').replace(
    "    names:", "    depth: int = 1\n    names:"
)
NEEDY = '''
"""Needs a key."""
from dataclasses import dataclass

@dataclass(frozen=True)
class Config:
    path: str
    nested: int | None = None
'''

BASE = """name: test
recipe: parts.plain
model: {name: parts.part}
data:
  name: parts.needy
  path: here
  batch_size: 4
train: {max_epochs: 1}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "parts").mkdir()
    for name, text in {"part": PART, "other": OTHER, "needy": NEEDY, "plain": '"""Plain."""\n'}.items():
        (tmp_path / "parts" / f"{name}.py").write_text(text)
    (tmp_path / "base.yaml").write_text(BASE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def failures(text: str, *overrides: str) -> list[str]:
    """The problems of a config, one line each."""
    Path("c.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load("c.yaml", overrides)
    return str(caught.value).splitlines()


def given_config(text: str, *overrides: str) -> RunConfig:
    Path("c.yaml").write_text(text)
    return load("c.yaml", overrides)


def test_defaults_are_filled_in() -> None:
    config = load("base.yaml")
    assert config.name == "test"
    assert config.model.options["size"] == [2, 3]
    assert config.model.options["inner"] == {"rate": 0.5}
    assert config.recipe.options == {}
    assert config.data.options == {"path": "here", "nested": None}
    assert (config.loading.batch_size, config.loading.workers) == (4, 0)
    assert [getattr(config, kind).name for kind in ("optimizer", "schedule", "strategy")] == [
        "adamw",
        "constant",
        "auto",
    ]
    assert config.train.precision == "32"
    assert {getattr(config, kind).kind for kind in KINDS} == set(KINDS)


def test_bare_text_names_a_component() -> None:
    config = given_config(BASE + "optimizer: sgd\n")
    assert config.optimizer.name == "sgd"
    assert config == given_config(BASE + "optimizer: {name: sgd}\n")


def test_an_empty_section_is_none() -> None:
    assert given_config(BASE + "checkpoint:\noptimizer:\n") == load("base.yaml")


def test_unquoted_scalars_serve_as_text_where_a_literal_wants_it() -> None:
    text = BASE.replace("parts.part}", "parts.part, act: 32, steps: [1, a]}").replace(
        "epochs: 1", "epochs: 1, precision: 32"
    )
    config = given_config(text)
    assert (config.train.precision, config.model.options["act"], config.model.options["steps"]) == (
        "32",
        "32",
        ["1", "a"],
    )
    assert given_config(BASE, "model.act=true").model.options["act"] == "true"


def test_whole_numbers_are_numbers_and_the_reverse_is_refused() -> None:
    config = given_config(BASE + "optimizer: {name: sgd, lr: 1}\n")
    assert config.optimizer.options["lr"] == 1.0
    assert isinstance(config.optimizer.options["lr"], float)
    assert failures(BASE + "seed: 1.0\n") == ["c.yaml:9: seed: got 1.0, wanted a whole number >= 0"]


def test_all_problems_come_together_with_their_places() -> None:
    text = """name: test
recipe: parts.plain
model:
  name: parts.part
  widht: 3
  act: gleu
  size: [1, x]
  inner: {rate: 1.5, max_epochs: 2}
  names: [a, 3]
  table: {a: b}
  either: x
data: {name: parts.needy, batch_size: 0}
optimizer: {name: sgdd}
train: {max_epochs: 2.5, accumulate: true, batch_size: 3}
tracking: [1]
epochs: 3
loading: {}
"""
    assert failures(text) == [
        "c.yaml:5: model.widht: unknown key 'widht', did you mean 'width'?",
        "c.yaml:6: model.act: got the text 'gleu', wanted one of relu, gelu, 32, true, did you mean 'gelu'?",
        "c.yaml:7: model.size.1: got the text 'x', wanted a whole number",
        "c.yaml:8: model.inner.rate: got 1.5, wanted a number > 0 and < 1",
        "c.yaml:8: model.inner.max_epochs: unknown key 'max_epochs', but there is train.max_epochs",
        "c.yaml:9: model.names.1: got 3, wanted text: put it in quotes",
        "c.yaml:10: model.table.a: got the text 'b', wanted a number",
        "c.yaml:11: model.either: got the text 'x', wanted a whole number or a list (each a whole number) or null",
        "c.yaml:12: data.batch_size: got 0, wanted a whole number >= 1",
        "c.yaml:12: data.path: missing: wants text",
        next(line for line in failures(text) if "'sgdd'" in line),
        "c.yaml:14: train.max_epochs: got 2.5, wanted a whole number >= 1 or null",
        "c.yaml:14: train.accumulate: got true, wanted a whole number >= 1",
        "c.yaml:14: train.batch_size: unknown key 'batch_size', but there is data.batch_size and evaluate.batch_size",
        "c.yaml:15: tracking: got a list of 1, wanted a mapping",
        next(line for line in failures(text) if "c.yaml:16: epochs: unknown key 'epochs'" in line),
        "c.yaml:17: loading: unknown key 'loading': its keys stand in the section 'data'",
    ]


def test_unknown_component_names_the_nearest_and_the_place() -> None:
    (line,) = failures(BASE + "optimizer: {name: sgdd}\n")
    assert line.startswith("c.yaml:9: optimizer.name: unknown optimizer 'sgdd', did you mean 'sgd'?")
    assert "sgdd.py" in line


def test_key_of_the_top_level_in_a_section_and_dots_in_a_file() -> None:
    lines = failures(BASE.replace("train: {", "train: {seed: 1, ") + "optimizer.lr: 0.1\n")
    assert lines == [
        "c.yaml:8: train.seed: unknown key 'seed', but there is 'seed' at the top level",
        "c.yaml:9: optimizer.lr: unknown key 'optimizer.lr': write sections as mappings, dots are for the command line",
    ]


def test_an_unknown_key_like_no_other_lists_the_keys() -> None:
    (line,) = failures(BASE + "tracking: {zzz: 1}\n")
    assert line.endswith("unknown key 'zzz'; there are: enabled, uri, experiment, tags, system_metrics")
    (line,) = failures(BASE.replace("parts.part}", "parts.part, inner: {zzz: 1}}"))
    assert line == "c.yaml:3: model.inner.zzz: unknown key 'zzz'"


def test_missing_sections() -> None:
    assert failures("seed: 1\n") == [
        "c.yaml: name: missing: wants text",
        "c.yaml: recipe: missing: name a recipe, as in `recipe: {name: ...}` (`trainer list` shows them)",
        "c.yaml: model: missing: name a model, as in `model: {name: ...}` (`trainer list` shows them)",
        "c.yaml: data: missing: name a data, as in `data: {name: ...}` (`trainer list` shows them)",
        "c.yaml: train.max_epochs: set max_epochs or max_steps, or training never ends",
    ]


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("model: [1]", "model: got a list of 1, wanted the name of a model or a mapping"),
        ("model: {width: 3}", "model: missing: name (`trainer list` shows every model)"),
        ("model: {name: 3}", "model.name: got 3, wanted the name of a model"),
        ("model: {name: parts.none}", "model.name: no module 'parts.none' for the model"),
        ("model: ../../secret", "model.name: '../../secret' is no name of a model"),
        ("model: {name: parts.part, width: 13}", "model.width: 13 brings bad luck"),
        ("model: {name: parts.part, width: 14}", "model: no good: at all"),
        ("model: {name: parts.part, width: 15}", "model: its Config fails with KeyError: 'bug'"),
        ("model: {name: parts.part, size: [1, 2, 3]}", "model.size: got a list of 3, wanted a list of 2"),
        ("model: {name: parts.part, size: [1]}", "wanted a list of 2 (a whole number, a whole number)"),
        ("model: {name: parts.part, either: [a]}", "model.either: got a list of 1, wanted a whole number or a list"),
        ("model: {name: parts.part, inner: 3}", "model.inner: got 3, wanted a mapping"),
    ],
)
def test_problems_of_a_component_section(section: str, expected: str) -> None:
    (line,) = failures(BASE.replace("model: {name: parts.part}", section))
    assert line.startswith("c.yaml:3: ")
    assert expected in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: set = None", "type set cannot stand in a config"),
        ("a: Annotated[int, 'big'] = 1", "'big' is no bound"),
        ("a: Annotated[int, '>= 1e999'] = 1", "'>= 1e999' is no bound"),
        ("a: Annotated[int, 3] = 1", "3 is no bound"),
        ("a: Annotated[str, '> 3'] = ''", "bounds need a number, not text"),
        ("a: dict[int, int] = None", "cannot stand in a config"),
        ("name: str = ''", "must not have a field 'name'"),
        ("workers: int = 1", "must not have a field 'workers'"),
        ("a: int = print()", "the default must be a literal"),
    ],
)
def test_components_that_no_config_can_serve(folder: Path, text: str, expected: str) -> None:
    head = "from dataclasses import dataclass\nfrom typing import Annotated\n@dataclass(frozen=True)\nclass Config:\n"
    (folder / "parts" / "broken.py").write_text(f"{head}    {text}\n")
    lines = failures(BASE.replace("  name: parts.needy\n  path: here\n", "  name: parts.broken\n"))
    assert len(lines) == 1
    assert expected in lines[0]


def test_broken_files_stop_with_their_own_problem(folder: Path) -> None:
    assert failures("a: [\n")[0].startswith("c.yaml:2: YAML syntax")
    assert failures("") == ["c.yaml: the file is empty"]
    assert failures(BASE + "name: again\n") == ["c.yaml:9: name: written twice in one mapping (first in line 1)"]


def test_problems_of_the_file_and_of_its_values_come_together() -> None:
    lines = failures(BASE + "seed: -1\nname: again\ntracking: {zzz: 1}\n")
    assert [line.split(":")[1] for line in lines] == ["9", "10", "11"]


# -- overrides


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
        ("model=3", "command line: model: got 3, wanted the name of a model or a mapping"),
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


# -- extends


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
    assert failures("extends: bad\n") == ["bad.yaml:10: seed: got the text 'x', wanted a whole number >= 0"]


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


def test_many_layers_that_extend_twice_are_quick(folder: Path) -> None:
    for level in range(40):
        (folder / f"l{level}.yaml").write_text(f"extends: [l{level + 1}, l{level + 1}]\n" if level < 39 else BASE)
    assert load("l0").name == "test"


# -- finding configs


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


def test_the_configs_that_ship_load() -> None:
    assert "quickstart.yaml" in shipped_configs()
    for name in shipped_configs():
        assert load(name).name


# -- rules between fields


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("name=a/b", "name"),
        ("name=.hidden", "name"),
        ("name=" + "x" * 101, "name"),
        ("runs_dir=", "runs_dir"),
        ("train.max_epochs=null", "train.max_epochs"),
        ("train.activation_checkpointing=layer(", "train.activation_checkpointing"),
        ("checkpoint.monitor=accuracy", "checkpoint.monitor"),
        ("tracking.uri=https://me:hunter2@host/x", "tracking.uri"),
        ("tracking.uri=https://hunter2@host/x", "tracking.uri"),
        ("tracking.uri=postgresql://me:hunter2@host/db", "tracking.uri"),
        ("tracking.uri=http://[hunter2", "tracking.uri"),
    ],
)
def test_rules_between_fields(override: str, key: str) -> None:
    (line,) = failures(BASE, override)
    assert line.startswith(f"command line: {key}: ")
    assert "hunter2" not in line


def test_a_monitor_needs_an_evaluation() -> None:
    text = BASE + "checkpoint: {monitor: val/accuracy}\n"
    assert given_config(text).checkpoint.monitor == "val/accuracy"
    (line,) = failures(text, "evaluate.every_epochs=null")
    assert line.startswith("c.yaml:9: checkpoint.monitor: needs evaluate.every_epochs")


def test_rules_pass_over_what_is_right() -> None:
    config = load("base.yaml")
    for text in ("none", "full", r"layer[34]\.\d+"):
        train = replace(config.train, activation_checkpointing=text)
        assert cross_check(replace(config, train=train)) == []
    for uri in ("sqlite:///a.db", "https://host:5000", "databricks", "./local@home"):
        assert cross_check(replace(config, tracking=replace(config.tracking, uri=uri))) == []


def test_rules_are_silent_where_the_section_is_wrong_already() -> None:
    assert failures(BASE.replace("max_epochs: 1", "max_epochs: x")) == [
        "c.yaml:8: train.max_epochs: got the text 'x', wanted a whole number >= 1 or null"
    ]


# -- and back


def test_dump_loads_to_an_equal_config(folder: Path) -> None:
    config = load(
        "base.yaml", ["optimizer=sgd", "optimizer.lr=1e-7", "tracking.tags={a: '1e-3', b: 'yes', c: '0o7', d: ''}"]
    )
    (folder / "out.yaml").write_text(dump(config))
    assert load("out.yaml") == config
    assert json.loads(json.dumps(as_dict(config))) == as_dict(config)
    assert "&" not in dump(config)


def test_as_dict_is_the_form_of_the_yaml() -> None:
    found = as_dict(load("base.yaml"))
    assert found["data"]["name"] == "parts.needy"
    assert (found["data"]["batch_size"], found["data"]["path"]) == (4, "here")
    assert "loading" not in found
    assert found["recipe"] == {"name": "parts.plain"}


def test_diff_names_the_keys() -> None:
    config = load("base.yaml")
    other = load(
        "base.yaml", ["seed=3", "data.batch_size=5", "model.names=[a]", "tracking.tags={x: y}", "optimizer=sgd"]
    )
    assert diff(config, config) == []
    found = diff(config, other)
    assert {"seed", "data.batch_size", "model.names", "tracking.tags", "tracking.tags.x", "optimizer.name"} <= set(
        found
    )
    assert "optimizer.weight_decay" in found
    assert diff(other, config) == found


def test_component_fields_puts_the_shared_ones_first() -> None:
    from dataclasses import fields

    names = [item.name for item in fields(component_fields("data", "parts.needy"))]
    assert names[0] == "batch_size"
    assert names[-2:] == ["path", "nested"]


# -- any input: a config or a ConfigError

WORDS = st.sampled_from(
    ["name", "recipe", "model", "data", "train", "optimizer", "extends", "tags", "parts.part", "adamw", "width", "size",
     "inner", "rate", "max_epochs", "precision", "32", "lr", "tracking", "loading", "either", "table", "anything"]
)  # fmt: skip
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**400, max_value=10**401)
    | st.floats()
    | st.text(max_size=5)
    | WORDS
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
ANY_CONFIG = st.dictionaries(WORDS, TREES, max_size=8)
QUICK = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def loads_or_config_error(source: str, overrides: list[str]) -> Iterator[RunConfig]:
    try:
        yield load(source, overrides)
    except ConfigError as error:
        assert error.problems
        assert all(problem.message for problem in error.problems)


@QUICK
@given(ANY_CONFIG, st.booleans())
def test_any_mapping_loads_or_gives_a_config_error(data: dict[str, Any], on_base: bool) -> None:
    sections = json.dumps(data)
    merged = {**data, "extends": "base.yaml"} if on_base else data
    Path("any.yaml").write_text(json.dumps(merged) if on_base else sections)
    for config in loads_or_config_error("any.yaml", []):
        Path("again.yaml").write_text(dump(config), encoding="utf-8")
        assert load("again.yaml") == config


@QUICK
@given(
    TREES,
    st.sampled_from(["model.anything", "model.either", "model.table", "model.inner", "tracking.tags", "model.names"]),
)
def test_any_value_loads_and_comes_back_or_gives_a_config_error(value: Any, key: str) -> None:
    for config in loads_or_config_error("base.yaml", [f"{key}={json.dumps(value, ensure_ascii=False)}"]):
        Path("again.yaml").write_text(dump(config), encoding="utf-8")
        assert load("again.yaml") == config


@QUICK
@given(
    st.lists(
        st.builds(
            "{}{}{}".format, WORDS | st.text(max_size=6), st.sampled_from(["=", ".lr=", ""]), st.text(max_size=8)
        ),
        max_size=3,
    )
)
def test_any_override_loads_or_gives_a_config_error(overrides: list[str]) -> None:
    list(loads_or_config_error("base.yaml", overrides))


@QUICK
@given(st.text(max_size=10).filter(lambda text: text not in (".", "..")))
def test_any_name_of_a_config_gives_a_config_error_where_there_is_none(name: str) -> None:
    if not os.path.exists(name.replace("\x00", "")):
        with pytest.raises(ConfigError):
            load(name)

"""The loader: checks with their places, rules between fields, and the way back to YAML."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from config_cases import BASE, failures, given_config, write_parts

from trainer.component import KINDS
from trainer.config_rules import cross_check
from trainer.load import as_dict, component_fields, diff, dump, load, shipped_configs


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_parts(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
    assert config.adapter is None
    assert {kind for kind in KINDS if getattr(config, kind, None)} == set(KINDS) - {"adapter", "sampler", "scheduler"}
    assert (config.tune.sampler.name, config.tune.scheduler.name) == ("tpe", "asha")
    assert config.init_from is None


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
    problem = "c.yaml:9: seed: got 1.0, wanted a whole number >= 0 and <= 9223372036854775807"
    assert failures(BASE + "seed: 1.0\n") == [problem]


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
        "c.yaml:8: train.seed: unknown key 'seed', but there is 'seed' at the top level and holdout.seed",
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
        "c.yaml: recipe: missing: write `recipe: {name: ...}` (`trainer list` shows the names)",
        "c.yaml: model: missing: write `model: {name: ...}` (`trainer list` shows the names)",
        "c.yaml: data: missing: write `data: {name: ...}` (`trainer list` shows the names)",
        "c.yaml: train.max_epochs: set max_epochs or max_steps, or training never ends",
    ]


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("model: [1]", "model: got a list of 1, wanted a name, or a mapping with one"),
        ("model: {width: 3}", "model: missing: name (`trainer list` shows the names)"),
        ("model: {name: 3}", "model.name: got 3, wanted a name"),
        ("model: {name: parts.none}", "model.name: no module 'parts.none' for the model"),
        ("model: ../../secret", "model.name: '../../secret' is no name"),
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


def test_the_configs_that_ship_load() -> None:
    assert "quickstart.yaml" in shipped_configs()
    for name in shipped_configs():
        assert load(name).name


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


@pytest.mark.parametrize(
    ("holdout", "key", "says"),
    [
        ("{method: k_fold, folds: 3, fold: 3}", "holdout.fold", "got 3, but of 3 folds the last is 2"),
        ("{fold: 1}", "holdout.fold", "method given cuts no folds"),
        ("{method: none, folds: 3}", "holdout.folds", "method none cuts no folds"),
        ("{seed: 1}", "holdout.seed", "method given cuts no folds"),
        ("{method: grouped}", "holdout.group_by", "method grouped needs to know what makes a group"),
        ("{method: stratified, group_by: x}", "holdout.group_by", "method stratified has no use for it"),
    ],
)
def test_rules_of_what_is_held_out(holdout: str, key: str, says: str) -> None:
    (line,) = failures(BASE + f"holdout: {holdout}\n")
    assert f"{key}: {says}" in line


def test_without_a_val_split_nothing_is_monitored() -> None:
    (line,) = failures(BASE, "holdout.method=none", "checkpoint.monitor=val/loss")
    assert line.startswith("command line: checkpoint.monitor: holdout.method none leaves no val split")


def test_what_is_held_out_stands_in_the_written_config_where_it_is_set() -> None:
    plain, other = load("base.yaml"), given_config(BASE, "holdout.method=k_fold", "holdout.fold=2")
    assert "holdout" not in as_dict(plain) and "holdout" not in dump(plain)
    assert as_dict(other)["holdout"] == {"method": "k_fold", "folds": 5, "fold": 2, "seed": 0, "group_by": None}
    assert given_config(dump(other)) == other
    assert diff(plain, other) == [f"holdout.{key}" for key in ("fold", "folds", "group_by", "method", "seed")]


def test_rules_pass_over_what_is_right() -> None:
    config = load("base.yaml")
    for text in ("none", "full", r"layer[34]\.\d+"):
        train = replace(config.train, activation_checkpointing=text)
        assert cross_check(replace(config, train=train)) == []
    for uri in ("sqlite:///a.db", "https://host:5000", "databricks", "databricks://team"):
        assert cross_check(replace(config, tracking=replace(config.tracking, uri=uri))) == []


def test_rules_are_silent_where_the_section_is_wrong_already() -> None:
    assert failures(BASE.replace("max_epochs: 1", "max_epochs: x")) == [
        "c.yaml:8: train.max_epochs: got the text 'x', wanted a whole number >= 1 or null"
    ]


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

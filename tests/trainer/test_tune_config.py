"""The section `tune` of a config: its components, its space tried on the rest of the config, and its rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from config_cases import BASE, failures, given_config, write_parts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.cli import main
from trainer.config import Tune
from trainer.errors import ConfigError, UserError
from trainer.load import as_dict, diff, dump, load
from trainer.resume import FREE
from trainer.search.rules import objectives_of

QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MONITORED = BASE + "checkpoint: {monitor: val/loss, mode: min}\n"
SPACE = BASE + "tune:\n  space:\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_parts(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_space(entries: str, tune: str = "") -> str:
    """A config whose space has these lines; the first stands in line 11."""
    return BASE + "tune:\n" + tune + "  space:\n" + "".join(f"    {line}\n" for line in entries.splitlines())


FULL = with_space(
    "optimizer.name: {choice: [adamw, sgd]}\n"
    "optimizer.lr: {log_uniform: [1e-4, 0.1]}\n"
    "optimizer.momentum: {uniform: [0, 0.99], when: {optimizer.name: sgd}}\n"
    "model.width: {int: [4, 64], log: true}\n"
    "model.size: {choice: [[1, 2], [3, 4]]}\n",
    "  objective: {val/loss: min}\n  sampler: {name: tpe, startup: 5}\n  scheduler: median\n",
)


def test_a_whole_section_loads_and_comes_back() -> None:
    config = given_config(FULL)
    assert list(config.tune.space) == [
        "optimizer.name",
        "optimizer.lr",
        "optimizer.momentum",
        "model.width",
        "model.size",
    ]
    assert config.tune.space["optimizer.momentum"] == {"uniform": [0, 0.99], "when": {"optimizer.name": "sgd"}}
    assert (config.tune.sampler.kind, config.tune.sampler.name, config.tune.sampler.options["startup"]) == (
        "sampler",
        "tpe",
        5,
    )
    assert config.tune.scheduler.name == "median"
    assert set(config.tune.sampler.options) > {"startup"}, "complete with defaults"
    Path("again.yaml").write_text(dump(config))
    assert load("again.yaml") == config
    assert as_dict(config)["tune"]["sampler"]["name"] == "tpe"


def test_where_nothing_is_set_nothing_is_written() -> None:
    config = given_config(BASE)
    assert config.tune == Tune()
    assert "tune" not in as_dict(config)
    for text in ("tune: {}\n", "tune:\n", "tune: {num_samples: 20, sampler: tpe}\n", "tune: {scheduler: {}}\n"):
        assert given_config(BASE + text) == config
        assert "tune" not in dump(given_config(BASE + text))


def test_the_section_may_change_when_a_run_goes_on() -> None:
    changed = diff(given_config(BASE), given_config(FULL))
    assert changed
    assert {key.partition(".")[0] for key in changed} == {"tune"} <= set(FREE)


@pytest.mark.parametrize("override", ["tune.sampler=random", "tune.sampler.name=random", "tune.sampler={name: random}"])
def test_another_sampler_takes_over_no_options(override: str) -> None:
    sampler = given_config(FULL, override).tune.sampler
    assert sampler.name == "random"
    assert "startup" not in sampler.options
    assert given_config(FULL, "tune.sampler.startup=7").tune.sampler.options["startup"] == 7
    assert given_config(FULL, "tune.sampler=tpe").tune.sampler.options["startup"] == 5
    assert given_config(FULL, "tune.sampler=random", "tune.num_samples=3").tune.num_samples == 3


def test_a_sampler_of_ones_own() -> None:
    Path("parts/mine.py").write_text(
        '"""Mine."""\nfrom dataclasses import dataclass\n@dataclass(frozen=True)\nclass Config:\n    depth: int = 2\n'
    )
    config = given_config(FULL, "tune.sampler={name: parts.mine, depth: 4}")
    assert (config.tune.sampler.name, config.tune.sampler.options) == ("parts.mine", {"depth": 4})


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("tune.sampler=tpee", "tune.sampler.name: unknown sampler 'tpee', did you mean 'tpe'?; there are: cmaes, "),
        ("tune.scheduler=ashaa", "tune.scheduler.name: unknown scheduler 'ashaa', did you mean 'asha'?"),
        ("tune.sampler.startupp=3", "tune.sampler.startupp: unknown key 'startupp', did you mean 'startup'?"),
        ("tune.sampler.num_samples=3", "unknown key 'num_samples', but there is tune.num_samples"),
        ("tune.startup=3", "tune.startup: unknown key 'startup', but there is tune.sampler.startup"),
        ("tune.sampler.startup=-1", "tune.sampler.startup: got -1, wanted a whole number >= 0"),
        ("tune.sampler=[tpe]", "tune.sampler: got a list of 1, wanted a name, or a mapping with one"),
        ("tune.sampler.name=3", "tune.sampler.name: got 3, wanted a name"),
        ("tune.nun_samples=3", "tune.nun_samples: unknown key 'nun_samples', did you mean 'num_samples'?"),
        ("num_samples=3", "num_samples: unknown key 'num_samples', but there is tune.num_samples"),
        ("tune.num_samples=0", "tune.num_samples: got 0, wanted a whole number >= 1"),
        ("tune.objective={val/loss: mim}", "tune.objective.val/loss: got the text 'mim', wanted one of max, min"),
        ("tune.objective={loss: min}", "tune.objective.loss: got 'loss', wanted a metric of the val split"),
        ("tune=3", "tune: got 3, wanted a mapping"),
        ("tune.space=3", "tune.space: got 3, wanted a mapping"),
        ("tune.space.optimizer.lr=3", "tune.space.optimizer.lr: got 3, wanted a distribution"),
        (
            "tune.space.optimizer.lr.uniform=[0, 1]",
            "an entry is given whole: tune.space.optimizer.lr={uniform: ...}",
        ),
        ("tune.space..=3", "is no override: write dotted.key=value"),
        ("tune.cross_validate=true", "tune.cross_validate: needs folds: set holdout.method to one of k_fold"),
    ],
)
def test_what_is_refused_on_the_command_line(override: str, expected: str) -> None:
    problems = failures(FULL, override)
    assert any(line.startswith("command line") and expected in line for line in problems), problems


def test_entries_are_replaced_as_a_whole() -> None:
    space = given_config(FULL, "tune.space.optimizer.lr={uniform: [0.1, 0.2]}").tune.space
    assert space["optimizer.lr"] == {"uniform": [0.1, 0.2]}
    assert len(space) == 5
    assert list(given_config(FULL, "tune.space={optimizer.lr: {uniform: [0.1, 0.2]}}").tune.space) == list(space)
    assert "model.size" not in given_config(FULL, "tune.space.model.size=null").tune.space
    assert given_config(FULL, "tune.space={}").tune.space == {}
    only = given_config(FULL, "tune.space={}", "tune.space.seed={int: [0, 9]}").tune.space
    assert only == {"seed": {"int": [0, 9]}}
    Path("below.yaml").write_text(FULL)
    above = given_config("extends: below\ntune: {space: {optimizer.lr: {uniform: [0.1, 0.2]}, model.width: null}}\n")
    assert above.tune.space["optimizer.lr"] == {"uniform": [0.1, 0.2]}
    assert list(above.tune.space) == ["optimizer.name", "optimizer.lr", "optimizer.momentum", "model.size"]


def test_space_problems_have_file_line_and_key() -> None:
    text = with_space(
        "optimizer.lrr: {uniform: [0.1, 1]}\n"
        "optimzer.lr: {uniform: [0.1, 1]}\n"
        "optimizer.lr: {uniform: [1, 0]}\n"
        "model.width: {int: [0, 8]}\n"
        "train.max_epoch: {int: [1, 8]}\n"
        "model.inner.rat: {uniform: [0.1, 0.2]}\n"
        "optimizer:\n"
        "  lr: {uniform: [0, 1]}\n"
    )
    assert failures(text) == [
        "c.yaml:13: tune.space.optimizer.lr: uniform: the range is the wrong way round: 1 is above 0",
        "c.yaml:17: tune.space.optimizer: holds optimizer.lrr, which is varied, too: leave one of them out",
    ]
    text = text.replace("[1, 0]", "[0.1, 1]").partition("    optimizer:\n")[0]
    assert failures(text) == [
        "c.yaml:11: tune.space.optimizer.lrr: unknown key 'lrr', did you mean 'lr'?",
        "c.yaml:12: tune.space.optimzer.lr: unknown key 'optimzer', did you mean 'optimizer'?",
        "c.yaml:14: tune.space.model.width: with model.width=0: got 0, wanted a whole number >= 1",
        "c.yaml:15: tune.space.train.max_epoch: unknown key 'max_epoch', did you mean 'max_epochs'?",
        "c.yaml:16: tune.space.model.inner.rat: unknown key 'rat'",
    ]


def test_problems_of_the_config_are_told_once_and_beside_those_of_the_space() -> None:
    text = with_space("model.width: {int: [0, 8]}\nmodel.act: {choice: [relu, gelo]}\n").replace(
        "max_epochs: 1", "max_epoch: 1"
    )
    assert failures(text) == [
        "c.yaml:8: train.max_epoch: unknown key 'max_epoch', did you mean 'max_epochs'?",
        "c.yaml:11: tune.space.model.width: with model.width=0: got 0, wanted a whole number >= 1",
        "c.yaml:12: tune.space.model.act: with model.act=gelo: got the text 'gelo', "
        "wanted one of relu, gelu, 32, true, did you mean 'gelu'?",
    ]


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ("model.width: {uniform: [1, 8]}", "with model.width=1.0: got 1.0, wanted a whole number >= 1"),
        ("model.width: {choice: [8, 13]}", "with model.width=13: 13 brings bad luck"),
        ("model.width: {choice: [8, 14]}", "with model.width=14: model: no good: at all"),
        ("model.size: {choice: [[1, 2], [1]]}", "with model.size=[1]: got a list of 1, wanted a list of 2"),
        ("model.size.0: {int: [1, 2]}", "with model.size.0=1: model.size: got a mapping, wanted a list of 2"),
        ("model.inner: {choice: [{rate: 0.5}, {rate: 1.5}]}", "model.inner.rate: got 1.5, wanted a number > 0 and < 1"),
        ("train.max_epochs: {choice: [1, null]}", "with train.max_epochs=null: set max_epochs or max_steps"),
        ("optimizer.name: {choice: [adamw, sdg]}", "with optimizer.name=sdg: unknown optimizer 'sdg', did you"),
        ("optimizer: {choice: [adamw, {name: sgd, beta1: 0.5}]}", "optimizer.beta1: unknown key 'beta1'"),
        ("model.table: {choice: [{a: 1}, {a: x}]}", "with model.table={a: x}: model.table.a: got the text 'x'"),
        ("seed: {int: [-1, 5]}", "with seed=-1: got -1, wanted a whole number >= 0"),
    ],
)  # fmt: skip
def test_values_that_the_config_refuses(entries: str, expected: str) -> None:
    problems = failures(with_space(entries))
    key = entries.partition(": {")[0]
    assert [line for line in problems if expected in line], problems
    assert all(line.startswith(f"c.yaml:11: tune.space.{key}: ") for line in problems)


def test_what_a_file_sets_for_one_component_does_not_stand_in_the_way_of_another() -> None:
    text = with_space("optimizer.name: {choice: [adamw, sgd]}\n") + "optimizer: {name: adamw, beta1: 0.8}\n"
    assert len(given_config(text).tune.space) == 1


def test_keys_of_a_component_that_is_chosen_are_tried_under_each() -> None:
    name = "optimizer.name: {choice: [adamw, sgd]}\n"
    (problem,) = failures(with_space(name + "optimizer.beta1: {uniform: [0.5, 0.9]}\n"))
    assert problem.startswith("c.yaml:12: tune.space.optimizer.beta1: with optimizer.name=sgd: unknown key 'beta1'")
    assert problem.endswith("; `when: {optimizer.name: ...}` limits it to those that have it")
    (problem,) = failures(with_space(name + "optimizer.momentum: {uniform: [0.5, 1], when: {optimizer.name: [sgd]}}\n"))
    assert "with optimizer.name=sgd, optimizer.momentum=1.0: got 1.0, wanted a number >= 0 and < 1" in problem
    problems = failures(
        with_space(name + "optimizer.beta1: {uniform: [0.5, 0.9], when: {optimizer.name: [adamw, sgd]}}\n")
    )
    assert ["with optimizer.name=sgd: unknown key 'beta1'" in line for line in problems] == [True]
    assert given_config(with_space(name + "optimizer.beta1: {uniform: [0.5, 0.9], when: {optimizer.name: adamw}}\n"))


def test_conditions_of_conditions_are_set_for_a_try() -> None:
    text = with_space(
        "model.name: {choice: [parts.part, parts.other]}\n"
        "model.depth: {choice: [2, 3], when: {model.name: parts.other}}\n"
        "model.act: {choice: [tanh, relu], when: {model.depth: 3}}\n"
    )
    (problem,) = failures(text)
    assert problem.startswith(
        "c.yaml:13: tune.space.model.act: with model.name=parts.other, model.depth=3, model.act=relu: got the text"
    )


def test_what_a_component_requires_may_come_from_the_space() -> None:
    text = with_space(
        "model.name: {choice: [parts.part, parts.needy]}\n"
        "model.path: {choice: [a, b], when: {model.name: parts.needy}}\n"
    )
    assert len(given_config(text).tune.space) == 2
    (problem,) = failures(text.partition("    model.path")[0])
    assert "with model.name=parts.needy: model.path: missing: wants text" in problem


SEVERAL = "  objective: {val/loss: min, val/accuracy: max}\n"
SOMETIMES = "model.width: {int: [1, 9], when: {seed: 1}}\nseed: {choice: [1, 2]}\n"
LR = "optimizer.lr: {log_uniform: [0.001, 0.1]}\n"


@pytest.mark.parametrize(
    ("entries", "tune", "expected"),
    [
        (LR, SEVERAL, "tune.scheduler: asha compares trials by one number: several objectives need scheduler none"),
        (LR, SEVERAL + "  scheduler: none\n  sampler: gp\n", "tune.sampler: gp looks for one objective only"),
        (LR, SEVERAL + "  scheduler: none\n  sampler: cmaes\n", "tune.sampler: cmaes looks for one objective only"),
        (LR, "  sampler: grid\n", "tune.space.optimizer.lr: log_uniform has no end of values, and sampler grid"),
        (LR, "  sampler: cmaes\n", "cmaes needs two numbers that every trial has, and the space has only optimizer.lr"),
        ("seed: {choice: [1, 2]}\n", "  sampler: cmaes\n", "and the space has none"),
        (LR + SOMETIMES, "  sampler: cmaes\n", "only optimizer.lr"),
        (LR, "  scheduler: pbt\n  cross_validate: true\n", "tune.cross_validate: a trial of scheduler pbt"),
        (LR, SEVERAL + "  scheduler: pbt\n", "pbt compares trials by one number"),
        ("model.width: {int: [1, 9]}\n", "  scheduler: pbt\n", "tune.space.model.width: cannot be varied by"),
        ("data.batch_size: {int: [1, 9]}\n", "  scheduler: pbt\n", "tune.space.data.batch_size: cannot be varied by"),
        ("optimizer.name: {choice: [adamw, sgd]}\n", "  scheduler: pbt\n", "space.optimizer.name: cannot be varied"),
        ("optimizer: {choice: [adamw, sgd]}\n", "  scheduler: pbt\n", "tune.space.optimizer: cannot be varied by"),
        ("seed: {int: [1, 9]}\n", "  scheduler: pbt\n", "tune.space.seed: cannot be varied by scheduler pbt"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(entries: str, tune: str, expected: str) -> None:
    problems = failures(with_space(entries, tune))
    assert any(expected in line for line in problems), problems


@pytest.mark.parametrize(
    ("entries", "tune"),
    [
        *[(LR, SEVERAL + f"  scheduler: none\n  sampler: {name}\n") for name in ("nsgaii", "tpe", "random", "qmc")],
        ("seed: {int: [1, 9]}\n", SEVERAL + "  scheduler: none\n  sampler: grid\n"),
        (LR, "  sampler: {name: grid, points: 4}\n"),
        (LR + "model.width: {int: [1, 9]}\nseed: {choice: [1, 2]}\n", "  sampler: cmaes\n"),
        (LR + "train.clip_norm: {choice: [null, 1.0]}\n", "  scheduler: pbt\n"),
    ],
)
def test_what_goes_together(entries: str, tune: str) -> None:
    assert given_config(with_space(entries, tune)).tune.space


def test_cross_validation_with_folds() -> None:
    text = with_space(LR, "  cross_validate: true\n") + "holdout: {method: k_fold, folds: 3}\n"
    assert given_config(text).tune.cross_validate
    (problem,) = failures(text, "holdout.method=none", "holdout.folds=5")
    assert problem.endswith("k_fold, stratified, grouped, time_series; it is none")


def test_an_objective_that_is_never_measured() -> None:
    (problem,) = failures(BASE + "tune: {objective: {val/loss: min}}\nevaluate: {every_epochs: null}\n")
    assert problem.startswith("c.yaml:9: tune.objective: needs evaluate.every_epochs or evaluate.every_steps")


def test_objectives() -> None:
    assert objectives_of(given_config(MONITORED)) == {"val/loss": "min"}
    both = MONITORED + "tune: {scheduler: none, objective: {val/a: max, val/b: min}}\n"
    assert list(objectives_of(given_config(both)).items()) == [("val/a", "max"), ("val/b", "min")]
    with pytest.raises(UserError, match=r"tune\.objective=.* or by checkpoint\.monitor=val/accuracy"):
        objectives_of(given_config(BASE))


def test_check_tells_how_large_the_space_is(capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.yaml").write_text(with_space("seed: {int: [0, 4]}\nmodel.act: {choice: [relu, gelu]}\n"))
    for extra in ([], ["--json"]):
        assert main(["check", "--config", "c.yaml", *extra]) == 0
        captured = capsys.readouterr()
        assert captured.err == "trainer: tune.space: 2 parameters, 10 different trials\n"
        assert "space" in captured.out
    assert main(["check", "--config", "c.yaml", "tune.space.optimizer.lr={uniform: [0.1, 1]}"]) == 0
    assert "3 parameters, no end of trials" in capsys.readouterr().err
    assert main(["check", "--config", "base.yaml"]) == 0
    assert capsys.readouterr().err == ""


WORDS = st.sampled_from(
    ["optimizer.lr", "optimizer.name", "optimizer", "model.width", "model.act", "seed", "uniform", "log_uniform", "int",
     "choice", "quantized", "when", "log", "space", "sampler", "scheduler", "name", "tpe", "grid", "pbt", "cmaes",
     "objective", "val/loss", "max", "startup", "num_samples", "adamw", "sgd", "relu"]
)  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | WORDS
RANGES = st.lists(st.integers(-2, 40) | st.floats(0, 2) | WORDS, min_size=1, max_size=3)
ENTRIES = st.dictionaries(
    st.sampled_from(["uniform", "log_uniform", "int", "choice", "quantized", "when", "log"]),
    RANGES | SCALARS | st.dictionaries(WORDS, SCALARS | RANGES, max_size=2),
    max_size=2,
)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3), max_leaves=8
)
SECTIONS = st.fixed_dictionaries(
    {},
    optional={
        "space": st.dictionaries(WORDS, ENTRIES, max_size=4) | TREES,
        "sampler": st.sampled_from(["tpe", "grid", "cmaes", "gp", {"startup": 3}]) | TREES,
        "scheduler": st.sampled_from(["asha", "none", "pbt", "median"]) | TREES,
        "objective": st.dictionaries(st.sampled_from(["val/a", "val/b", "c"]), st.sampled_from(["max", "min"])) | TREES,
        "cross_validate": st.booleans(),
    },
)


@QUICK
@given(SECTIONS | TREES)
def test_any_section_loads_and_comes_back_or_gives_a_config_error(section: Any) -> None:
    Path("any.yaml").write_text(json.dumps({"extends": "base.yaml", "tune": section}))
    try:
        config = load("any.yaml")
    except ConfigError as error:
        assert error.problems
        assert all(problem.message for problem in error.problems)
        return
    Path("again.yaml").write_text(dump(config), encoding="utf-8")
    assert load("again.yaml") == config

"""The search space as data: distributions, conditions, size, and the overrides that give a trial its values."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from config_cases import write_parts
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from trainer.load import load
from trainer.search.parameter import identity
from trainer.search.space import Parameter, Space, SpaceError, overrides, read_space

QUICK = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_parts(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def messages(raw: dict[str, Any]) -> list[str]:
    """What is wrong with a space, one line each."""
    with pytest.raises(SpaceError) as caught:
        read_space(raw)
    assert str(caught.value).splitlines() == [f"tune.space.{key}: {text}" for key, text in caught.value.problems]
    return [f"{key}: {text}" for key, text in caught.value.problems]


def one(**entry: Any) -> Parameter:
    """The parameter of one entry."""
    (parameter,) = read_space({"a.b": entry})
    return parameter


def test_distributions_are_read_with_their_types() -> None:
    assert one(uniform=[0, 1]) == Parameter("a.b", "uniform", 0.0, 1.0)
    assert isinstance(one(uniform=[0, 1]).high, float)
    assert one(log_uniform=[1e-5, 1]) == Parameter("a.b", "log_uniform", 1e-5, 1.0)
    assert one(int=[-2, 3]) == Parameter("a.b", "int", -2, 3)
    assert one(int=[1, 64], log=True) == Parameter("a.b", "int", 1, 64, log=True)
    assert one(choice=[1, "1", None, [1, 2], {"a": 1}]).choices == (1, "1", None, [1, 2], {"a": 1})
    assert one(quantized=[0.1, 0.5, 0.1]) == Parameter("a.b", "quantized", 0.1, 0.5, 0.1)


@pytest.mark.parametrize(
    ("bounds", "values"),
    [
        ([0.1, 0.5, 0.1], [0.1, 0.2, 0.3, 0.4, 0.5]),
        ([0.1, 0.55, 0.1], [0.1, 0.2, 0.3, 0.4, 0.5]),
        ([0, 1, 0.25], [0.0, 0.25, 0.5, 0.75, 1.0]),
        ([-0.3, 0.3, 0.3], [-0.3, 0.0, 0.3]),
        ([16, 64, 16], [16, 32, 48, 64]),
        ([16, 70, 16], [16, 32, 48, 64]),
        ([1e-5, 3e-5, 1e-5], [1e-5, 2e-5, 3e-5]),
    ],
)
def test_grids_are_exact_to_the_decimal(bounds: list[float], values: list[float]) -> None:
    parameter = one(quantized=bounds)
    assert list(parameter.values()) == values
    assert [type(value) for value in parameter.values()] == [type(values[0])] * len(values)
    assert (parameter.low, parameter.high) == (values[0], values[-1])
    assert all(parameter.contains(value) for value in values)
    assert [parameter.snap(value * 1.0001) for value in values] == values
    assert not parameter.contains(values[0] + (values[1] - values[0]) / 3)


@given(st.integers(-1000, 1000), st.integers(1, 999), st.integers(1, 500), st.integers(0, 6))
def test_every_value_of_a_grid_is_the_decimal_that_one_would_write(
    low: int, step: int, count: int, digits: int
) -> None:
    def written(number: int) -> float:
        return float(f"{number}e-{digits}")

    high = written(low + step * count)
    parameter = one(quantized=[written(low), high, written(step)])
    assert parameter.count() == count + 1
    assert parameter.high == high
    assert [parameter.at(index) for index in range(count + 1)] == [written(low + step * i) for i in range(count + 1)]


def test_a_grid_of_the_widest_range_is_counted_at_once() -> None:
    parameter = one(quantized=[-1.7e308, 1.7e308, 5e-324])
    assert (parameter.count() or 0) > 10**600
    assert parameter.at(0) == -1.7e308
    assert parameter.snap(1.5) == 1.5


def test_contains_tells_types_apart() -> None:
    whole = one(int=[1, 4])
    assert [whole.contains(value) for value in (1, 4, 2.0, 0, 5, 2.5, True, "2", None, math.nan, math.inf)] == [
        *[True] * 3,
        *[False] * 8,
    ]
    choice = one(choice=[1, "a", False, None, [1, {"b": 2}]])
    assert all(choice.contains(value) for value in (1, 1.0, "a", False, None, [1, {"b": 2.0}]))
    assert not any(choice.contains(value) for value in (True, 0, "1", [], [1, {"b": True}], "None"))
    assert one(log_uniform=[0.1, 1]).contains(1)
    assert not one(uniform=[0.1, 1]).contains(1.0000001)


def test_snap_stays_inside() -> None:
    assert one(int=[1, 4]).snap(99.0) == 4
    assert one(int=[1, 4]).snap(2.4) == 2
    assert one(uniform=[0, 1]).snap(-3) == 0.0
    assert one(quantized=[0.1, 0.55, 0.1]).snap(0.56) == 0.5


def test_descriptions() -> None:
    assert one(log_uniform=[1e-4, 0.1]).describe() == "log-uniform 0.0001 to 0.1"
    assert one(uniform=[0, 1]).describe() == "uniform 0.0 to 1.0"
    assert one(int=[1, 8]).describe() == "whole number 1 to 8"
    assert one(int=[1, 8], log=True).describe() == "whole number 1 to 8, on a log scale"
    assert one(quantized=[0.1, 0.5, 0.2]).describe() == "number 0.1 to 0.5 in steps of 0.2"
    assert one(choice=["adamw", "1", None, [8, 16]]).describe() == 'one of adamw, "1", null, [8, 16]'


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (3, "got 3, wanted a distribution such as {uniform: [0.0, 0.5]}"),
        ([0, 1], "got a list of 2, wanted a distribution"),
        ({}, "names no distribution: one of uniform, log_uniform, int, choice, quantized"),
        ({"log": True}, "names no distribution"),
        ({"lr": {"uniform": [0, 1]}}, "unknown distribution 'lr': one of uniform, log_uniform"),
        ({"lr": {"uniform": [0, 1]}}, "a key inside a.b is written a.b.lr"),
        ({"logunifrom": [1, 2]}, "unknown key 'logunifrom', did you mean 'log_uniform'?"),
        ({"uniform": [0, 1], "wen": {}}, "unknown key 'wen', did you mean 'when'?"),
        ({"uniform": [0, 1], "zzzz": {}}, "unknown key 'zzzz'; there are: uniform"),
        ({"uniform": [0, 1], "int": [0, 1]}, "has several distributions: uniform, int; leave one"),
        ({"uniform": 3}, "uniform: got 3, wanted a list such as [0.0, 0.5]"),
        ({"uniform": [1]}, "uniform: got a list of 1, wanted [low, high]"),
        ({"uniform": [0, 1, 2]}, "uniform: got a list of 3, wanted [low, high]"),
        ({"uniform": [1, 0]}, "uniform: the range is the wrong way round: 1 is above 0"),
        ({"uniform": [1, 1.0]}, "uniform: the range is the one point 1: set it as 1, or widen it"),
        ({"uniform": [2**60, 2**60 + 1]}, "uniform: the range is one point, as numbers have 16 digits"),
        ({"uniform": ["1e-3", 1]}, "uniform: low: got the text '1e-3', wanted a number"),
        ({"uniform": [0, True]}, "uniform: high: got true, wanted a number"),
        ({"uniform": [0, 10**400]}, "uniform: high: too large for a number"),
        ({"uniform": [0, math.inf]}, "uniform: high: too large for a number"),
        ({"uniform": [0, None]}, "uniform: high: got null, wanted a number"),
        ({"log_uniform": [0, 1]}, "log_uniform: a log scale needs a lower end above 0, got 0"),
        ({"log_uniform": [-1.5, 1]}, "got -1.5"),
        ({"int": [0, 8], "log": True}, "int: a log scale needs a lower end above 0, got 0"),
        ({"int": [0.5, 8]}, "int: low: got 0.5, wanted a whole number"),
        ({"int": [1, 8], "log": "yes"}, "log: got the text 'yes', wanted true or false"),
        ({"uniform": [1, 8], "log": True}, "log: goes with int only; use log_uniform"),
        ({"choice": [1, 8], "log": False}, "log: goes with int only"),
        ({"choice": []}, "choice: the list is empty"),
        ({"choice": "ab"}, "choice: got the text 'ab', wanted a list such as [16, 32, 64]"),
        ({"choice": ["a", "b", "a"]}, "choice: a is there twice"),
        ({"choice": [1, 1.0]}, "choice: 1.0 is there twice"),
        ({"choice": [[1, {"a": 2}], [1, {"a": 2.0}]]}, "is there twice"),
        ({"choice": list(range(251))}, "choice: 251 choices are more than 250: use int or quantized"),
        ({"choice": [math.nan]}, "choice: nan is no value that a config can hold"),
        ({"quantized": [0, 1]}, "quantized: got a list of 2, wanted [low, high, step]"),
        ({"quantized": [0, 1, 0]}, "quantized: step: got 0, wanted a number above 0"),
        ({"quantized": [0, 1, -0.1]}, "quantized: step: got -0.1, wanted a number above 0"),
        ({"quantized": [0, 1, 1.5]}, "quantized: the step 1.5 does not fit between 0 and 1"),
        ({"quantized": [1, 0, 0.5]}, "quantized: the range is the wrong way round"),
        ({"uniform": [0, 1], "when": "sgd"}, "when: got the text 'sgd', wanted a mapping"),
        ({"uniform": [0, 1], "when": {"a.c": []}}, "when: a.c has no value that would do"),
    ],
)
def test_what_is_wrong_with_an_entry(entry: Any, expected: str) -> None:
    assert expected in "\n".join(messages({"a.b": entry}))


def test_true_and_1_are_two_choices() -> None:
    assert len(one(choice=[1, True, "1", 0, False, None]).choices) == 6


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"tune.num_samples": 1}, "tune.num_samples: cannot be varied: it is the search itself"),
        ({"name": 1}, "name: cannot be varied: it names the folder"),
        ({"runs_dir": 1}, "runs_dir: cannot be varied"),
        ({"resume": 1}, "resume: cannot be varied"),
        ({"tracking.uri": 1}, "tracking.uri: cannot be varied"),
        ({"holdout.fold": 1}, "holdout.fold: cannot be varied: trials that are measured on different samples"),
        ({"extends": 1}, "extends: cannot be varied: it belongs in a file"),
        ({"": 1}, ": is no dotted key"),
        ({"a..b": 1}, "a..b: is no dotted key"),
        ({".a": 1}, ".a: is no dotted key"),
        ({"a=b": 1}, "a=b: is no dotted key"),
        ({" a": 1}, " a: is no dotted key"),
        (
            {"optimizer": {"choice": ["sgd", "adamw"]}, "optimizer.lr": {"uniform": [0.1, 1]}},
            "optimizer: holds optimizer.lr, which is varied, too",
        ),
        ({"a": {"uniform": [0, 1], "when": {"a": 1}}}, "a: cannot depend on itself"),
        (
            {"abc": {"choice": [1, 2]}, "a": {"uniform": [0, 1], "when": {"abd": 1}}},
            "a: when: abd is no key of the space, did you mean 'abc'?",
        ),
        (
            {"c": {"choice": ["x", "y"]}, "a": {"uniform": [0, 1], "when": {"c": ["x", "z", 1]}}},
            "a: when: c is never z; it is one of x, y",
        ),
        (
            {"c": {"uniform": [0, 1]}, "a": {"uniform": [0, 1], "when": {"c": 0.5}}},
            "a: when: c has no values that can be counted (uniform 0.0 to 1.0): use a choice or an int",
        ),
        (
            {"c": {"choice": [[1, 2], [3]]}, "a": {"uniform": [0, 1], "when": {"c": [1, 2]}}},
            "a: when: c: a list stands for several values; the value [1, 2] is written [[1, 2]]",
        ),
        (
            {
                "a": {"choice": [1, 2], "when": {"b": 1}},
                "b": {"choice": [1, 2], "when": {"c": 1}},
                "c": {"choice": [1, 2], "when": {"a": 1}},
            },
            "a: depends on itself: a -> b -> c -> a",
        ),
        (
            {
                "a": {"choice": [1, 2]},
                "b": {"choice": [1, 2], "when": {"a": 1}},
                "c": {"choice": [1, 2], "when": {"a": 2, "b": 1}},
            },
            "c: is never varied: its conditions exclude each other at a",
        ),
        (
            {"m.name": {"choice": [1, 2], "when": {"m.x": 1}}, "m.x": {"choice": [1, 2]}},
            "m.name: depends on itself: m.name -> m.x -> m.name",
        ),
    ],
)
def test_what_is_wrong_with_a_space(raw: dict[str, Any], expected: str) -> None:
    assert expected in "\n".join(messages(raw))


def test_everything_wrong_is_told_together() -> None:
    raw = {"a": {"uniform": [1, 0]}, "b": {"choice": [], "zz": 1}, "c": {"int": [1, 2], "when": {"x": 1}}, "name": 1}
    assert [text.partition(":")[0] for text in messages(raw)] == ["a", "b", "b", "name", "c"]


def test_a_long_chain_of_conditions_is_followed_and_a_longer_one_refused() -> None:
    raw: dict[str, Any] = {f"k{i}": {"choice": [1, 2], "when": {f"k{i + 1}": 1}} for i in range(199)}
    raw["k199"] = {"choice": [1, 2]}
    space = read_space(raw)
    assert [parameter.key for parameter in space][:2] == ["k199", "k198"]
    assert space.size() == 201
    raw["k200"] = {"choice": [1, 2]}
    assert messages(raw) == ["k200: a space has at most 200 keys, not 201"]


def test_conditions_and_names_of_components_come_first() -> None:
    space = read_space(
        {
            "optimizer.momentum": {"uniform": [0, 1], "when": {"optimizer.name": ["sgd"], "x": 2}},
            "optimizer.lr": {"uniform": [0.1, 1]},
            "z": {"uniform": [0, 1]},
            "x": {"int": [1, 3]},
            "optimizer.name": {"choice": ["adamw", "sgd"]},
        }
    )
    assert [parameter.key for parameter in space] == ["optimizer.name", "x", "optimizer.momentum", "optimizer.lr", "z"]
    assert space["x"].kind == "int"
    assert "z" in space and "zz" not in space
    assert len(space) == 5
    assert space.requirements(space["optimizer.momentum"]) == {"optimizer.name": ("sgd",), "x": (2,)}
    assert space.requirements(space["z"]) == {}


def test_a_condition_on_a_list() -> None:
    space = read_space({"c": {"choice": [[1, 2], [3]]}, "a": {"choice": [1, 2, 3], "when": {"c": [[1, 2]]}}})
    assert space["a"].is_active({"c": [1, 2]})
    assert not space["a"].is_active({"c": [3]})
    assert space.size() == 4


def test_what_depends_on_an_absent_one_is_absent() -> None:
    space = read_space(
        {
            "a": {"choice": [1, 2]},
            "b": {"choice": ["x", "y"], "when": {"a": 1}},
            "c": {"uniform": [0, 1], "when": {"b": "x"}},
        }
    )

    def there(**params: Any) -> list[str]:
        return [parameter.key for parameter in space.active(params)]

    assert there(a=1, b="x") == ["a", "b", "c"]
    assert there(a=1, b="y") == ["a", "b"]
    assert there(a=2, b="x") == ["a"], "what b would be does not count where it is absent"
    assert there() == ["a"]
    assert not space["b"].is_active({"a": True}), "true is not 1"


def test_size() -> None:
    assert read_space({}).size() == 1
    assert read_space({"a": {"choice": [1, 2, 3]}, "b": {"int": [0, 9]}}).size() == 30
    assert read_space({"a": {"choice": [1, 2]}, "b": {"uniform": [0, 1]}}).size() is None
    conditional = {
        "o.name": {"choice": ["a", "b", "c"]},
        "o.x": {"choice": [1, 2, 3, 4], "when": {"o.name": "a"}},
        "o.y": {"quantized": [0, 1, 0.1], "when": {"o.name": ["b"]}},
    }
    assert read_space(conditional).size() == 4 + 11 + 1
    conditional["o.z"] = {"uniform": [0, 1], "when": {"o.name": "c"}}
    assert read_space(conditional).size() is None
    assert read_space({"a": {"int": [1, 10**9]}, "b": {"int": [1, 5], "when": {"a": [7, 8]}}}).size() == 10**9 - 2 + 10


def test_size_of_many_conditions_takes_no_time() -> None:
    raw: dict[str, Any] = {f"c{i}": {"int": [1, 10**6]} for i in range(40)}
    for i in range(40):
        raw[f"d{i}"] = {"choice": [1, 2], "when": {f"c{i}": [1]}}
    raw["all"] = {"choice": [1, 2, 3], "when": {f"c{i}": [5] for i in range(40)}}
    assert read_space({key: raw[key] for key in raw if key != "all"}).size() == (10**6 + 1) ** 40
    assert read_space(raw).size() == (10**6 + 1) ** 40 + 2


def brute_force(space: Space) -> Iterator[tuple[Any, ...]]:
    """What is there in each combination of all values."""
    for values in itertools.product(*(list(parameter.values()) for parameter in space)):
        params = {parameter.key: value for parameter, value in zip(space, values, strict=True)}
        yield tuple((parameter.key, identity(params[parameter.key])) for parameter in space.active(params))


@st.composite
def finite_spaces(draw: st.DrawFn) -> dict[str, Any]:
    """Spaces with chained conditions, whose keys stand in any order."""
    raw: dict[str, Any] = {}
    for key in "abcde"[: draw(st.integers(1, 5))]:
        kind = draw(st.sampled_from(["choice", "int", "quantized"]))
        entry: dict[str, Any] = {
            "choice": {"choice": draw(st.lists(st.sampled_from([0, 1, "x", None]), min_size=1, unique=True))},
            "int": {"int": [0, draw(st.integers(1, 3))]},
            "quantized": {"quantized": [0, draw(st.integers(1, 3)), 1]},
        }[kind]
        for other in raw:
            if draw(st.booleans()):
                possible = list(one(**{k: v for k, v in raw[other].items() if k != "when"}).values())
                values = draw(st.lists(st.sampled_from(possible), min_size=1, max_size=3))
                entry.setdefault("when", {})[other] = values
        raw[key] = entry
    return dict(draw(st.permutations(list(raw.items()))))


@QUICK
@given(finite_spaces())
def test_size_counts_the_different_trials(raw: dict[str, Any]) -> None:
    try:
        space = read_space(raw)
    except SpaceError as error:
        assert all("is never varied" in message for _key, message in error.problems)
        return
    assert space.size() == len(set(brute_force(space)))
    for parameter in space:
        assert any(parameter.key in dict(trial) for trial in brute_force(space)), "each is there in some trial"


NUMBERS = (
    st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(min_value=10**300, max_value=10**301)
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["1", "1e-3", "true", "null", "~", "", " ", " a ", "a # b", "a: b", "a:b", "'a'", '"', "[1]", "{a: 1}", "{", "- a",
     "0x10", "0o7", ".5", ".inf", ".nan", "yes", "*a", "&a", "!!int 3", "|", "a\nb", "\\", "\x85", "\ufeff", "<<", "=",
     "a=b", "\U0001f600", "\x00", "#"]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@QUICK
@given(VALUES)
@example({"<<": {"a": 1}, "": [], "x": {}})
@example(1e16)
@example(5e-324)
@example(-0.0)
def test_an_override_gives_exactly_the_value(value: Any) -> None:
    (Path("c.yaml")).write_text("extends: base\nmodel: {anything: {left: over}}\n")
    texts = overrides({"model.anything": value})
    loaded = load("c.yaml", texts).model.options["anything"]
    assert exact(loaded) == exact(value)
    assert all(text.isprintable() for text in texts), "it can stand on one line of a log"


def exact(value: Any) -> str:
    """A text that differs wherever two plain values differ, in type, sign of zero or order of keys."""
    return json.dumps(value)


def test_overrides_put_names_of_components_first_and_keep_the_order() -> None:
    params = {"train.max_steps": 3, "optimizer.lr": 0.1, "optimizer.name": "sgd", "data.batch_size": 8}
    assert overrides(params) == [
        "optimizer.name=sgd",
        "train.max_steps=3",
        "optimizer.lr=0.1",
        "data.batch_size=8",
    ]
    config = load("base.yaml", overrides(params))
    assert (config.optimizer.name, config.optimizer.options["lr"]) == ("sgd", 0.1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, object(), {1, 2}, [math.nan], b"x"])
def test_what_no_config_can_hold_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="a config can hold"):
        overrides({"a": value})

"""The JSON Schema agrees with the loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from trainer.component import KINDS, available
from trainer.errors import ConfigError
from trainer.layers import CONFIGS
from trainer.load import as_dict, load, shipped_configs
from trainer.schema import json_schema

BASE: dict[str, Any] = {
    "name": "x",
    "recipe": "image_classification",
    "model": {"name": "cnn"},
    "data": {"name": "digits"},
    "train": {"max_epochs": 1},
}


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = json_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def loads(data: dict[str, Any], folder: Path) -> bool:
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(data))
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    try:
        load(path)
    except ConfigError:
        return False
    return True


def test_shipped_configs_are_valid_as_written_and_as_resolved(validator: Draft202012Validator) -> None:
    for name in shipped_configs():
        validator.validate(yaml.safe_load((CONFIGS / name).read_text()))
        validator.validate(as_dict(load(name)))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"model": "cnn"},
        {"optimizer": "sgd"},
        {"optimizer": {"lr": 0.1, "beta1": 0.5}},
        {"optimizer": None},
        {"train": {"max_epochs": 1, "precision": 32}},
        {"train": {"max_epochs": None, "max_steps": 3, "clip_norm": 1}},
        {"checkpoint": None},
        {"tracking": {"tags": {"a": "b"}}},
        {"tune": None},
        {"tune": {"sampler": "random", "scheduler": {"name": "asha", "grace": 2}, "objective": {"val/loss": "min"}}},
        {"tune": {"sampler": {"startup": 3}, "scheduler": None}},
        {"tune": {"space": {"optimizer.lr": {"log_uniform": [1e-4, 1]}, "seed": None}}},
        {"tune": {"space": {"seed": {"int": [1, 9], "log": True}, "model.dropout": {"quantized": [0, 0.5, 0.1]}}}},
        {"tune": {"space": {"seed": {"choice": [1, 2]}, "optimizer.lr": {"uniform": [1, 2], "when": {"seed": 1}}}}},
        {"data": {"name": "digits", "batch_size": 8, "augment": ["HorizontalFlip", {"Affine": {"scale": 2}}]}},
    ],
)
def test_what_loads_is_valid(validator: Draft202012Validator, tmp_path: Path, change: dict[str, Any]) -> None:
    data = {**BASE, **change}
    assert loads(data, tmp_path)
    assert validator.is_valid(data), list(validator.iter_errors(data))


@pytest.mark.parametrize(
    "change",
    [
        {"unknown": 1},
        {"name": 3},
        {"seed": -1},
        {"seed": "x"},
        {"resume": "always"},
        {"model": {}},
        {"model": "nothing_of_this_name"},
        {"model": {"name": "nothing_of_this_name"}},
        {"data": {"name": "image_folder"}},
        {"data": "image_folder"},
        {"data": {"name": "digits", "batch_size": 0}},
        {"data": {"name": "digits", "zzz": 0}},
        {"optimizer": {"name": "sgd", "beta1": 0.1}},
        {"optimizer": {"momentum": 0.1}},
        {"optimizer": {"name": "adamw", "lr": 0}},
        {"train": {"max_epochs": 1, "precision": 64}},
        {"train": {"max_epochs": 0}},
        {"train": []},
        {"loading": {}},
        {"extends": 3},
        {"tracking": {"tags": {"a": 1}}},
        {"tune": []},
        {"tune": {"num_samples": 0}},
        {"tune": {"sampler": "nothing_of_this_name"}},
        {"tune": {"sampler": {"startupp": 3}}},
        {"tune": {"sampler": {"name": "random", "startup": 3}}},
        {"tune": {"scheduler": {"name": "asha", "grace": 0}}},
        {"tune": {"objective": {"val/loss": "mim"}}},
        {"tune": {"space": []}},
        {"tune": {"space": {"seed": 3}}},
        {"tune": {"space": {"seed": {}}}},
        {"tune": {"space": {"seed": {"int": [1]}}}},
        {"tune": {"space": {"seed": {"int": [1, 2.5]}}}},
        {"tune": {"space": {"seed": {"int": [1, 2], "choice": [1, 2]}}}},
        {"tune": {"space": {"seed": {"choice": []}}}},
        {"tune": {"space": {"seed": {"quantised": [1, 2, 1]}}}},
        {"tune": {"space": {"optimizer.lr": {"quantized": [1, 2]}}}},
    ],
)
def test_what_is_refused_is_invalid(validator: Draft202012Validator, tmp_path: Path, change: dict[str, Any]) -> None:
    data = {**BASE, **change}
    assert not loads(data, tmp_path)
    assert not validator.is_valid(data)


@pytest.mark.parametrize("key", ["name", "recipe", "model", "data"])
def test_required_sections(validator: Draft202012Validator, key: str) -> None:
    data = {name: value for name, value in BASE.items() if name != key}
    assert not validator.is_valid(data)
    assert validator.is_valid({"extends": "base", **data})


def test_a_file_that_extends_may_leave_out_what_the_base_says(validator: Draft202012Validator, tmp_path: Path) -> None:
    data = {"extends": ["base"], "data": {"batch_size": 4}, "optimizer": {"lr": 0.1}}
    assert loads(data, tmp_path)
    assert validator.is_valid(data)
    assert not validator.is_valid({"extends": "base", "data": {"batch_size": 0}})


def test_own_modules_are_left_open(validator: Draft202012Validator) -> None:
    assert validator.is_valid({**BASE, "model": "mypkg.nets.tiny"})
    assert validator.is_valid({**BASE, "model": {"name": "mypkg.nets.tiny", "whatever": [1]}})
    assert not validator.is_valid({**BASE, "data": {"name": "mypkg.data", "batch_size": 0}})


def test_editors_get_help_defaults_and_bounds() -> None:
    schema = json_schema()
    lr = schema["$defs"]["optimizer.sgd"]["properties"]["lr"]
    assert lr["exclusiveMinimum"] == 0
    assert lr["type"] == "number"
    assert "default" in lr
    assert lr["description"]
    assert schema["properties"]["train"]["properties"]["max_epochs"]["description"].startswith("Passes over")
    assert schema["$defs"]["data.digits"]["properties"]["batch_size"]["description"]
    for kind in KINDS:
        assert {f"{kind}.{name}" for name in available(kind)} <= set(schema["$defs"])


def test_types_of_all_sorts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer import component

    (tmp_path / "recipes" / "models").mkdir(parents=True)
    (tmp_path / "recipes" / "models" / "odd.py").write_text(
        '"""Odd."""\nfrom dataclasses import dataclass, field\nfrom typing import Any\n'
        "@dataclass(frozen=True)\nclass Inner:\n    rate: float\n    a: int = 1\n"
        "@dataclass(frozen=True)\nclass Config:\n    inner: Inner | None = None\n"
        "    size: tuple[int, float] = (1, 2.0)\n    sizes: tuple[int, ...] = ()\n"
        "    table: dict[str, bool] = field(default_factory=dict)\n    any: Any = None\n"
    )
    monkeypatch.setattr(component, "ROOT", tmp_path)
    monkeypatch.setattr("trainer.layers.DEFAULT_COMPONENTS", {})
    monkeypatch.setattr("trainer.schema.DEFAULT_COMPONENTS", {})
    properties = json_schema()["$defs"]["model.odd"]["properties"]
    size = Draft202012Validator(properties["size"])
    assert size.is_valid([1, 2.5])
    assert not any(size.is_valid(value) for value in ([1], [1, 2, 3], ["a", 1], 3))
    inner = Draft202012Validator(properties["inner"])
    assert inner.is_valid({"rate": 1})
    assert inner.is_valid(None)
    assert not any(inner.is_valid(value) for value in ({}, {"rate": 1, "b": 1}, 3))
    assert Draft202012Validator(properties["sizes"]).is_valid([1, 2, 3])
    assert not Draft202012Validator(properties["table"]).is_valid({"a": 1})
    assert Draft202012Validator(properties["any"]).is_valid([{}])

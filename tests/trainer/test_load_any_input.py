"""Any file and any override give a config or a ConfigError, never another exception."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from config_cases import write_parts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.config import RunConfig
from trainer.errors import ConfigError
from trainer.load import dump, load


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_parts(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


WORDS = st.sampled_from(
    ["name", "recipe", "model", "data", "train", "optimizer", "extends", "tags", "parts.part", "adamw", "width", "size",
     "inner", "rate", "max_epochs", "precision", "32", "lr", "tracking", "loading", "either", "table", "anything",
     "tune", "space", "sampler", "tune.space"]
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
            "{}{}{}".format,
            WORDS | st.text(max_size=6),
            st.sampled_from(["=", ".lr=", ".space.seed=", ""]),
            st.text(max_size=8),
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

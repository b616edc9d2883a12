"""Base models: what is refused before weights are read, and by the config before anything is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm import case, tiny

from recipes.language.base import find
from trainer.errors import ConfigError, UserError
from trainer.load import diff, dump, load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("base") / "tiny")


def test_the_fingerprint_is_of_the_weights_wherever_they_lie(folder: Path, tmp_path: Path) -> None:
    found = find(str(folder))
    assert found.fingerprint == find(str(tiny.write(tmp_path / "same"))).fingerprint
    assert found.fingerprint != find(str(tiny.write(tmp_path / "other", seed=1))).fingerprint


def test_broken_files_are_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(UserError, match=r"cut.gguf: the GGUF file is broken"):
        find(str(tmp_path / "cut.gguf"))
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(UserError, match="is no GGUF file"):
        find(str(tmp_path / "text.gguf"))
    with pytest.raises(UserError, match="'nowhere/at/all' is not there"):
        find("nowhere/at/all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config.json can't be read"):
        find(str(tmp_path / "empty"))
    broken = tiny.write(tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model.safetensors is damaged"):
        find(str(broken))


@pytest.mark.parametrize(
    ("sections", "key", "message"),
    [
        ({"init_from": None}, "adapter", "set init_from"),
        ({"recipe": "image_classification"}, "adapter", "does not take it"),
        ({"adapter": {"name": "qlora"}, "strategy": "fsdp"}, "strategy.name", "use strategy ddp"),
        ({"adapter": {"name": "lora", "target_modules": []}}, "adapter.target_modules", "is empty"),
    ],
)
def test_a_config_refuses(sections: dict[str, Any], key: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(case.config(tmp_path, "case", **sections))
    assert any(problem.key == key and message in problem.message for problem in caught.value.problems)


def test_an_adapter_comes_back_from_the_dump_and_null_takes_it_away(tmp_path: Path) -> None:
    path = case.config(tmp_path, "case")
    config, without = load(path), load(path, ["adapter=null"])
    (tmp_path / "dumped.yaml").write_text(dump(without))
    assert load(tmp_path / "dumped.yaml") == without and without.adapter is None and config.adapter is not None
    assert "adapter.r" in diff(config, without)

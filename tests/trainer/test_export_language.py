"""Bundles of language runs: merged, with the adapter beside its base, and what can't be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lm import case
from outcome import only_run

from serving.bundle import Bundle
from serving.language import golden
from trainer.cli import main
from trainer.errors import TrainerError, UserError
from trainer.export.language import LanguageExport, LanguageOptions, adapter_name, write_language_bundle
from trainer.run import Run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A run of each kind, trained in this process."""
    folder = tmp_path_factory.mktemp("runs")
    kinds: dict[str, Any] = {
        "lora": {"name": "lora", "r": 4},
        "dora": {"name": "lora", "r": 4, "dora": True},
        "qlora": {"name": "qlora", "r": 4},
        "whole": None,
    }
    for name, adapter in kinds.items():
        assert main(["fit", "--config", str(case.config(folder, name, adapter=adapter))]) == 0
    return {name: Run.open(only_run(folder, name)) for name in kinds}


def _export(run: Run, folder: Path, **options: Any) -> LanguageExport:
    return write_language_bundle(run, run.config(), "best", folder, LanguageOptions(**options), lambda text: None)


@pytest.mark.parametrize("name", ["lora", "qlora", "whole"])
def test_a_bundle_holds_the_model_as_it_was_trained(name: str, runs: dict[str, Run], tmp_path: Path) -> None:
    made = _export(runs[name], tmp_path / "bundle", golden=3, price=2.0)
    bundle = Bundle.read(tmp_path / "bundle")
    bundle.verify()
    assert bundle.version == made.bundle.version and bundle.adapters == {}
    assert (bundle.program.runtime, bundle.program.dtype) == ("transformers", "float32")
    assert bundle.metrics["val/loss"] > 0 and bundle.run["id"] == runs[name].id
    assert len(golden.read(bundle)) == bundle.golden.count == 3
    assert made.deviation <= (5e-2 if name == "qlora" else 1e-4)
    capacity = json.loads(bundle.file("measurements.json").read_text())["capacity"]
    assert [row["rows"] for row in capacity["rows"]] == [1, 8, 32] and capacity["usd_per_million_tokens"] > 0
    card = bundle.file("card.md").read_text()
    assert "val/loss" in card and "answers at once" in card and runs[name].id in card
    # Nothing of the machine that exported it; the run's own id is no path.
    texts = [file.read_text() for file in bundle.path.rglob("*") if file.suffix in (".json", ".md", ".jsonl")]
    assert not any(str(runs[name].path.parents[2]) in text for text in texts)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_an_adapter_stays_beside_its_base(name: str, runs: dict[str, Run], tmp_path: Path) -> None:
    _export(runs[name], tmp_path / "bundle", golden=4, adapters=True)
    bundle = Bundle.read(tmp_path / "bundle")
    assert bundle.adapters == {name: f"adapters/{name}"}
    answers = golden.read(bundle)
    assert [entry.adapter for entry in answers] == [name] * 4 + [None]
    assert answers[0].prompt == answers[4].prompt and answers[0].tokens != answers[4].tokens
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        Path(file).name for file in bundle.files if file.startswith("adapters/")
    }


def test_refusals(runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="trained without an adapter"):
        _export(runs["whole"], tmp_path / "bundle", adapters=True)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("x")
    with pytest.raises(UserError, match="is there already"):
        _export(runs["lora"], tmp_path / "taken")
    with pytest.raises(UserError, match="was not quantised"):
        _export(runs["lora"], tmp_path / "bundle", into="dequantized")


def test_a_model_that_answers_otherwise_is_told(
    runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.export.language.TOLERANCE", {"float32": 0.0})
    with pytest.raises(TrainerError, match="does not answer as the run's: golden prompts: log-probabilities deviate"):
        _export(runs["lora"], tmp_path / "bundle", golden=2)


def test_an_adapter_s_name_fits_a_request_and_a_module() -> None:
    assert adapter_name("lora-smollm2") == "lora-smollm2"
    assert adapter_name("a.b c/ü") == "a-b-c" and adapter_name("..") == "adapter"


def test_the_command(runs: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`trainer export` of a language model's run, and what it refuses there."""
    command = ["export", str(runs["lora"].path), "--output", str(tmp_path / "b")]
    assert main([*command, "--format", "onnx"]) == 2
    assert "--format onnx: a language model is served from its folder" in capsys.readouterr().err
    assert main([*command, "--quantize", "int8"]) == 2
    assert main([*command, "--adapters", "--golden", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    bundle = Bundle.read(tmp_path / "b")
    assert told["format"] == "safetensors" and told["adapters"] == ["lora"] == sorted(bundle.adapters)
    assert told["version"] == bundle.version and bundle.golden.count > 2
    assert main(command) == 2
    assert "is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["b"]

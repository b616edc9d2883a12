"""`trainer check` and `trainer list`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from trainer.cli import main
from trainer.commands.list import TOPICS
from trainer.component import KINDS, available
from trainer.load import as_dict, load, shipped_configs

Capture = pytest.CaptureFixture[str]


def test_check_prints_a_config_that_loads_to_the_same(tmp_path: Path, capsys: Capture) -> None:
    assert main(["check", "--config", "quickstart", "optimizer.lr=0.5"]) == 0
    (tmp_path / "resolved.yaml").write_text(capsys.readouterr().out)
    config = load(tmp_path / "resolved.yaml")
    assert config == load("quickstart", ["optimizer.lr=0.5"])
    assert config.optimizer.options["lr"] == 0.5


def test_check_as_json(capsys: Capture) -> None:
    assert main(["check", "--config", "quickstart", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == as_dict(load("quickstart"))


def test_check_prints_the_schema(capsys: Capture) -> None:
    assert main(["check", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    Draft202012Validator.check_schema(schema)
    assert Draft202012Validator(schema).is_valid(as_dict(load("quickstart")))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "--config is missing"),
        (["--schema", "--config", "quickstart"], "leave --config and the overrides out"),
        (["--schema", "seed=1"], "leave --config and the overrides out"),
        (["--config", "quickstrat"], "did you mean 'quickstart.yaml'?"),
        (["--config", "quickstart", "seed=x"], "command line: seed: got the text 'x', wanted a whole number >= 0"),
    ],
)
def test_check_refuses(argv: list[str], expected: str, capsys: Capture) -> None:
    assert main(["check", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert expected in captured.err


def test_overview_names_everything(capsys: Capture) -> None:
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for kind in KINDS:
        for name in available(kind):
            assert f"\n  {name} " in out
    for name in shipped_configs():
        assert f"\n  {name} " in out
    assert max(map(len, out.splitlines())) <= 120


def test_one_topic_shows_fields_with_type_default_and_help(capsys: Capture) -> None:
    assert main(["list", "optimizers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("sgd")
    assert lines[at + 1].startswith("  ")
    momentum = next(line for line in lines[at:] if line.split()[0:1] == ["momentum"])
    assert momentum.split()[1] == "0.9"
    assert "a number >= 0" in momentum


def test_shared_keys_of_data_are_shown_once(capsys: Capture) -> None:
    assert main(["list", "data"]) == 0
    out = capsys.readouterr().out
    assert out.count("batch_size ") == 1
    assert "every data set" in out
    assert main(["list", "data", "--json"]) == 0
    (digits,) = [row for row in json.loads(capsys.readouterr().out)["data"] if row["name"] == "digits"]
    assert {"batch_size", "workers"} <= {field["name"] for field in digits["fields"]}


def test_json_of_every_topic(capsys: Capture) -> None:
    assert main(["list", "--json"]) == 0
    everything = json.loads(capsys.readouterr().out)
    assert set(everything) == {*TOPICS, "configs"}
    assert {kind: [row["name"] for row in everything[topic]] for topic, kind in TOPICS.items()} == {
        kind: available(kind) for kind in KINDS
    }
    (folder,) = [row for row in everything["data"] if row["name"] == "image_folder"]
    (path,) = [field for field in folder["fields"] if field["name"] == "path"]
    assert path["required"] is True
    assert "default" not in path


def test_configs_show_their_first_comment(capsys: Capture) -> None:
    assert main(["list", "configs", "--json"]) == 0
    for row in json.loads(capsys.readouterr().out)["configs"]:
        assert row["help"], f"{row['name']} does not open with what to expect"
    assert main(["list", "configs"]) == 0
    assert "quickstart.yaml\n  " in capsys.readouterr().out


def test_an_empty_topic_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    from trainer import component, layers

    monkeypatch.setattr(component, "ROOT", tmp_path)
    monkeypatch.setattr(layers, "CONFIGS", tmp_path)
    assert main(["list", "models"]) == 0
    assert capsys.readouterr().out == "no models yet\n"
    assert main(["list"]) == 0
    assert capsys.readouterr().out.count("  none\n") == len(TOPICS) + 1


def test_unknown_topic(capsys: Capture) -> None:
    assert main(["list", "modls"]) == 2
    assert "invalid choice: 'modls'" in capsys.readouterr().err


def test_yaml_of_check_is_plain_yaml(capsys: Capture) -> None:
    assert main(["check", "--config", "quickstart"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == as_dict(load("quickstart"))

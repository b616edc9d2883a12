"""`trainer data preview`: samples as the model sees them, facts as JSON, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.cli import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def config(smol_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "cache"))
    rows = [
        {
            "prompt": f"What is {n} + 1?",
            "completion": f"Let me see.\nIt is \x1b[31m{n + 1}." + " Really." * (n == 7) * 60,
        }
        for n in range(20)
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    sections: dict[str, Any] = {
        "name": "look",
        "recipe": {"name": "toy.talking_recipe", "tokenizer": str(smol_tokenizer), "max_length": 96},
        "model": {"name": "toy.net"},
        "data": {"name": "instructions", "path": str(tmp_path / "sums.jsonl"), "val_fraction": 0.0},
        "train": {"max_steps": 1},
    }
    (tmp_path / "look.yaml").write_text(json.dumps(sections))
    return str(tmp_path / "look.yaml")


def test_samples_show_what_is_learnt_and_what_is_not(config: str, capsys: Capture) -> None:
    assert main(["data", "preview", "--config", config, "--num", "2"]) == 0
    out = capsys.readouterr().out
    first = out.split("\n\n")[0].splitlines()
    assert first[0].startswith("sums.jsonl:1: ") and "of them targets" in first[0]
    assert first[-6:] == [
        ". <|im_start|>user⏎",
        ". What is 0 + 1?<|im_end|>⏎",
        ". <|im_start|>assistant⏎",
        "> Let me see.⏎",
        "> It is \\x1b[31m1.<|im_end|>",
        ". ⏎",
    ]
    assert "sums.jsonl:21: " in out and "\x1b" not in out
    for said in (
        "data.path: format prompt_completion, recognised by prompt, completion",
        "data: rows: train 21; 1 duplicates in train",
        "train: 21 documents, ",
        "1 truncated to 96",
        "lengths in tokens: min ",
        "packed: ",
    ):
        assert said in out, said


def test_a_terminal_gets_the_masked_part_dim(config: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    assert main(["data", "preview", "--config", config, "--num", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "\033[2m. <|im_start|>assistant⏎\033[0m" in lines and "> Let me see.⏎" in lines


def test_facts_as_json_and_overrides(config: str, capsys: Capture) -> None:
    argv = ["data", "preview", "recipe.max_length=64", "--config", config, "data.val_fraction=0.2", "--split", "val"]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["split"], found["max_length"], found["documents"]) == (
        "val",
        64,
        5,
    )  # four of twenty, of which one is there twice
    assert found["rows"]["overlap"] == 0 and 0 < found["fill"]["packed"] <= 1
    assert found["lengths"]["min"] <= found["lengths"]["p50"] <= found["lengths"]["max"] <= 64
    sample = found["samples"][0]
    assert [piece["target"] for piece in sample["pieces"]] == [False, True, False]
    assert sample["place"].startswith("sums.jsonl:") and sample["targets"] < sample["tokens"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--split", "test"], "--split: the data have no split 'test'; they have: train"),
        (["--num", "-1"], "--num -1: wanted 0 or more"),
        (["data.path=gone.jsonl"], "data.path: 'gone.jsonl' is not there"),
        (["data.columns={prompt: q}"], "no known format has the keys prompt, completion"),
        (["recipe.max_length=4"], "no conversation is left of 21"),
    ],
)
def test_refusals_are_one_line(argv: list[str], expected: str, config: str, capsys: Capture) -> None:
    assert main(["data", "preview", "--config", config, *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and expected in captured.err and captured.err.count("\n") == 1


def test_a_recipe_without_a_preview_is_refused(capsys: Capture) -> None:
    assert main(["data", "preview", "--config", "quickstart"]) == 2
    assert "recipe image_classification: " in capsys.readouterr().err

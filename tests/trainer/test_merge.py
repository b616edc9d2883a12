"""Merged models against adapted ones: logits, greedy answers, refusals, and what plain transformers reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import environment
from lm import case
from outcome import only_run

from trainer.cli import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each adapter, trained in this process."""
    folder = tmp_path_factory.mktemp("merge")
    adapters: dict[str, dict[str, Any]] = {"lora": {"name": "lora", "r": 4}, "qlora": {"name": "qlora", "r": 4}}
    for name, adapter in adapters.items():
        assert main(["fit", "--config", str(case.config(folder, name, adapter=adapter))]) == 0
    return {name: only_run(folder, name) for name in adapters}


PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert not any(name.split(".")[0] in ("trainer", "recipes", "peft") for name in sys.modules)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
assert AutoTokenizer.from_pretrained(sys.argv[1]).chat_template
torch.manual_seed(0)
answers = []
for _ in range(50):
    ids = torch.randint(5, 60, (1, 6))
    answers.append(model.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist())
print(json.dumps(answers))
"""


@pytest.mark.parametrize(("name", "into"), [("lora", "original"), ("qlora", "dequantized"), ("qlora", "original")])
def test_a_merged_model_answers_as_the_adapted_one(
    name: str, into: str, runs: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "merged"
    argv = ["merge", str(runs[name]), "--output", str(output), "--json"]
    assert main([*argv, *(["--into", into] if name == "qlora" else [])]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["into"] == into and told["drift"] <= 1e-4
    card = (output / "README.md").read_text()
    assert f"{told['drift']:.3g}" in card and "fingerprint of the base" in card and "val/loss" in card
    if into == "dequantized":
        return
    plain = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(output)], cwd=tmp_path, env=plain, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == _adapted_answers(runs[name])


def _adapted_answers(run: Path) -> list[list[int]]:
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(str(run / "adapter")).eval()
    torch.manual_seed(0)
    prompts = [torch.randint(5, 60, (1, 6)) for _ in range(50)]
    return [model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0].tolist() for ids in prompts]


def test_beyond_the_tolerance_nothing_is_left(runs: dict[str, Path], tmp_path: Path, capsys: Capture) -> None:
    output = tmp_path / "merged"
    assert main(["merge", str(runs["lora"]), "--output", str(output), "--tolerance", "0"]) == 1
    assert "more than --tolerance 0: nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_refusals(runs: dict[str, Path], tmp_path: Path, capsys: Capture) -> None:
    assert main(["merge", str(runs["lora"]), "--output", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["merge", str(runs["lora"]), "--into", "dequantized"]) == 2
    assert "was not quantised" in capsys.readouterr().err
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == 2
    assert "neither a run nor a model" in capsys.readouterr().err


def test_generate_answers_prompts_of_a_file(runs: dict[str, Path], tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "asked.jsonl"
    file.write_text('{"prompt": "one"}\n{"messages": [{"role": "user", "content": "two"}]}\n')
    assert main(["generate", str(runs["lora"]), "--file", str(file), "--max-new-tokens", "4", "--json"]) == 0
    answers = json.loads(capsys.readouterr().out.splitlines()[-1])["answers"]
    assert [row["messages"][0]["content"] for row in answers] == ["one", "two"]
    file.write_text('{"question": "one"}\n')
    assert main(["generate", str(runs["lora"]), "--file", str(file)]) == 2
    assert "asked.jsonl:1: wants a JSON object" in capsys.readouterr().err

"""Merged models against adapted ones: logits, greedy answers, refusals, and what plain transformers reads."""

from __future__ import annotations

import importlib.util
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


HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None


@pytest.mark.skipif(HAS_LM_EVAL, reason="lm-eval is installed")
def test_tasks_of_lm_eval_without_the_library_are_one_line(runs: dict[str, Path], capsys: Capture) -> None:
    assert main(["evaluate", str(runs["lora"]), "--lm-eval", "arc_easy"]) == 2
    assert "--lm-eval: the library lm-eval is not installed: pip install lm-eval" in capsys.readouterr().err


@pytest.mark.skipif(not HAS_LM_EVAL, reason="lm-eval is not installed: pip install lm-eval")
def test_a_task_of_ones_own_is_scored_by_lm_eval(runs: dict[str, Path], tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "Two and two are"}\n' * 3)
    task = {
        "task": "own_sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["four", "five"],
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "own_sums.yaml").write_text(json.dumps(task))
    command = ["evaluate", str(runs["lora"]), "--lm-eval", "own_sums", "--lm-eval-tasks", str(tmp_path), "--json"]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["metrics"]["own_sums/acc"] in (0.0, 1.0)
    assert json.loads((runs["lora"] / "artifacts" / "lm_eval.json").read_text())["metrics"] == told["metrics"]
    assert main(["evaluate", str(runs["lora"]), "--lm-eval", "nothing_here"]) == 2
    assert "--lm-eval: lm-eval has no task nothing_here" in capsys.readouterr().err

"""The real model that ships: adapted, merged, asked, and read by plain transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from harness import environment
from outcome import only_run

from trainer.cli import main

TINY = ["train.max_steps=2", "train.device=cpu", "recipe.max_length=96", "data.batch_size=1", "data.val_fraction=0.01"]
QUIET = ["evaluate.at_start=false", "tracking.enabled=false"]
PLAIN = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
asked = [{"role": "user", "content": sys.argv[2]}]
ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
made = model.generate(**ids, max_new_tokens=8, do_sample=False)
assert not any(name.split(".")[0] in ("trainer", "recipes") for name in sys.modules)
print(tokenizer.decode(made[0, ids["input_ids"].shape[1]:], skip_special_tokens=True))
"""
QUESTION = "What is the capital of France?"


def test_smollm2_is_adapted_merged_and_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["finetune-lora", *TINY, *QUIET]) == 0
    run = only_run(tmp_path, "lora-smollm2")
    assert (run / "adapter" / "adapter_model.safetensors").stat().st_size < 20 << 20  # not the base's 538 MB

    capsys.readouterr()
    assert main(["merge", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["drift"] <= 1e-4 and told["prompts"] > 1

    merged = told["folder"]
    assert main(["generate", merged, "--prompt", QUESTION, "--max-new-tokens", "8", "--json"]) == 0
    (said,) = json.loads(capsys.readouterr().out.splitlines()[-1])["answers"]
    assert said["answer"].strip()

    plain = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
    line = [sys.executable, "-c", PLAIN, str(Path(merged).resolve()), QUESTION]
    done = subprocess.run(line, cwd=tmp_path, env=plain, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == said["answer"].strip()

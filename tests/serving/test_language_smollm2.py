"""The real model that ships, fine-tuned for two steps: served with and without its adapter."""

from __future__ import annotations

import json
from pathlib import Path

import language_bundles
import language_servers
import pytest
from outcome import only_run

from serving.bundle import Bundle
from serving.language import golden
from trainer.cli import main

openai = pytest.importorskip("openai")

TINY = ["train.max_steps=2", "train.device=cpu", "recipe.max_length=96", "data.batch_size=1", "data.val_fraction=0.01"]
QUIET = ["evaluate.at_start=false", "tracking.enabled=false"]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.mark.timeout(900)
def test_smollm2_is_served_with_and_without_its_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.export.language import LanguageOptions, write_language_bundle
    from trainer.run import Run

    monkeypatch.chdir(tmp_path)
    # A learning rate with which two steps can be seen in the answers.
    assert main(["finetune-lora", *TINY, *QUIET, "optimizer.lr=0.02", "schedule.warmup_steps=0"]) == 0
    run = Run.open(only_run(tmp_path, "lora-smollm2"))
    options = LanguageOptions(adapters=True, golden=3)
    made = write_language_bundle(run, run.config(), "newest", tmp_path / "bundle", options, lambda text: None)
    bundle = Bundle.read(tmp_path / "bundle")
    assert made.deviation <= 1e-3 and list(bundle.adapters) == ["lora-smollm2"]
    with language_servers.serve(bundle.path, "--threads", "2", "--kv-tokens", "4096") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=240)
        said = {}
        for name, adapter in (("lora-smollm2", None), ("lora-smollm2:lora-smollm2", "lora-smollm2")):
            answer = client.chat.completions.create(model=name, messages=QUESTION, max_tokens=10, temperature=0)
            stream = client.chat.completions.create(
                model=name, messages=QUESTION, max_tokens=10, temperature=0, stream=True
            )
            said[adapter] = answer.choices[0].message.content
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == said[adapter]
    for adapter, text in said.items():
        assert text == _plain(bundle, adapter)
    assert said[None] != said["lora-smollm2"]
    assert "Paris" in said[None]
    answers = {entry.adapter: entry for entry in golden.read(bundle)}
    assert set(answers) == {None, "lora-smollm2"}
    assert json.loads(bundle.file("measurements.json").read_text())["capacity"]["tokens_per_second"] > 0


def _plain(bundle: Bundle, adapter: str | None) -> str:
    """What transformers and PEFT say without us."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundle.path / "model")
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)["input_ids"]
    tokens = language_bundles.greedy(language_bundles.reference(bundle.path, adapter), ids, 10)
    said: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return said

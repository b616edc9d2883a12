"""The language model of a run's checkpoint, or of a folder, ready to answer."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer import random_state, saving, state
from trainer.assembly import base_of, build_data, build_task
from trainer.checkpoint import Checkpoint
from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.evaluate import choose
from trainer.peft_adapter import quiet_bitsandbytes
from trainer.run import Run
from trainer.state import Tensors
from trainer.task import Task

FALLBACK_PROMPTS = ("What is the capital of France?", "Write one sentence about the sea.", "2 + 2 =", "Who are you?")


@dataclass(frozen=True)
class Opened:
    """A checkpoint of a run, in its own model."""

    task: Task
    data: Any
    """The data set as its own file gives it."""
    checkpoint: Checkpoint
    weights: Tensors
    """What the checkpoint holds by name in `task.model`; averages where it has them."""
    model: nn.Module
    """transformers' model, or PEFT's around it, in evaluation mode."""


def open_run(run: Run, config: RunConfig, which: str, say: Callable[[str], None]) -> Opened:
    """Build the task of a run and put the checkpoint `which` (`best`, `newest` or a step) into it.

    Raises UserError for a run that trains no language model, or whose base is another one by now.
    """
    found = choose(run.checkpoints, config, which, say)
    random_state.seed_everything(config.seed)
    data = build_data(config)
    task = build_task(config, data)
    model = language_model(task)
    loaded = saving.load(found.path, found.manifest)
    is_partial = any(not parameter.requires_grad for parameter in task.model.parameters())
    state.require_base(base_of(task) if is_partial else None, loaded)
    weights = {**loaded.model, **loaded.ema}
    live = task.model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in weights.items():
            live[name].copy_(tensor)
    as_usual(model)
    return Opened(task, data, found, weights, model)


def language_model(task: Task) -> Any:
    """The outermost transformers or PEFT model in a task's module."""
    from peft import PeftModel
    from transformers import PreTrainedModel

    found = next((m for m in task.model.modules() if isinstance(m, PeftModel | PreTrainedModel)), None)
    if found is None or task.tokenizer is None:
        raise UserError("RUN: trains no language model of transformers")
    return found


def as_usual(model: Any) -> None:
    """Evaluation mode, transformers' own attention (a recipe may have set one for packed samples), keys cached."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base.config._attn_implementation != "eager":  # which some models have alone
        base.set_attn_implementation("sdpa")
    base.config.use_cache = True
    model.eval()


def open_folder(folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder that transformers or PEFT reads. Raises UserError for another one."""
    quiet_bitsandbytes()
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loader: Any = AutoPeftModelForCausalLM if (folder / "adapter_config.json").is_file() else AutoModelForCausalLM
    if loader is AutoModelForCausalLM and not (folder / "config.json").is_file():
        raise UserError(f"{folder}: neither a run nor a model: it has no run.json, config.json or adapter_config.json")
    try:
        with quiet():
            model, tokenizer = loader.from_pretrained(str(folder)), AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"{folder}: can't be loaded ({type(error).__name__}: {first})") from error
    as_usual(model)
    return model, tokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and advice."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        if bars:
            logging.enable_progress_bar()


def render(tokenizer: Any, messages: list[dict[str, str]], is_open: bool = True) -> torch.Tensor:
    """Ids [1, T] of a conversation by the chat template; `is_open` asks for an answer. Without a template, the text."""
    if tokenizer.chat_template is None:
        text = "\n".join(message["content"] for message in messages)
        ids: torch.Tensor = tokenizer(text, return_tensors="pt").input_ids
        return ids
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_open)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    return ids


def real_prompts(opened: Opened, count: int, max_tokens: int) -> list[torch.Tensor]:
    """Ids [1, T] of the first conversations of the run's validation data (its training data where it has none)."""
    tokenizer = opened.task.tokenizer
    prompts = []
    for messages in conversations(opened.data, count):
        ids = render(tokenizer, messages, is_open=False)[:, :max_tokens]
        if ids.shape[1]:
            prompts.append(ids)
    return prompts


def conversations(data: Any, count: int) -> Iterator[list[dict[str, str]]]:
    """The first of the validation data (of the training data where there is none); fixed ones where data has none."""
    split = data.split("val") or data.split("train")
    given = 0
    for index in range(min(count, len(split)) if hasattr(split, "__getitem__") else 0):
        conversation = split[index]
        text = getattr(conversation, "text", None)
        turns = [{"role": turn.role, "content": turn.content} for turn in conversation.messages]
        yield turns if text is None else [{"role": "user", "content": text}]
        given += 1
    if not given:
        for prompt in FALLBACK_PROMPTS[:count]:
            yield [{"role": "user", "content": prompt}]


def read_prompts(file: Path) -> list[list[dict[str, str]]]:
    """Conversations of a file: a `.jsonl` with `prompt` or `messages` in each row, else one prompt a line."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--file: {file}: can't be read ({error})") from error
    if file.suffix != ".jsonl":
        return [[{"role": "user", "content": line}] for line in lines if line.strip()]
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
            found.append([{"role": str(turn["role"]), "content": str(turn["content"])} for turn in messages])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--file: {file}:{number}: wants a JSON object with `prompt` or `messages`") from error
    return found

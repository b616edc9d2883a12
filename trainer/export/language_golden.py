"""Golden prompts: requests as a client sends them, with the greedy answers of the run's own model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from trainer.errors import TrainerError
from trainer.language_model import FALLBACK_PROMPTS, Opened, conversations, render

FILE = "golden.jsonl"
ANSWER_TOKENS = 16
LONGEST_PROMPT = 256
"""Tokens: a server answers them each time it starts."""
LOOKED_AT = 64
"""Conversations that are looked at for short enough ones."""


def write_golden(opened: Opened, base: Any, folder: Path, adapter: str | None, count: int) -> int:
    """Write the prompts' file; returns how many there are.

    Args:
        base: the base alone, where it is served with and without its adapter; it answers a quarter of them.
        adapter: what the run's own model is called in requests; None where it is the bundle's only one.
    """
    requests = list(_requests(opened, count))
    asked = [(opened.model, adapter, request) for request in requests]
    if base is not None:
        asked += [(base, None, request) for request in requests[: max(1, count // 4)]]
    rows = []
    for model, name, request in asked:
        ids = _ids(opened.task.tokenizer, request)
        tokens, logprobs = _answer(model, opened.task.tokenizer, ids)
        rows.append(
            {
                "request": request,
                "adapter": name,
                "prompt_ids": ids,
                "outputs": {"token_ids": tokens, "logprobs": logprobs},
                "text": opened.task.tokenizer.decode(tokens, skip_special_tokens=True),
            }
        )
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / FILE).write_text(text, encoding="utf-8", newline="\n")
    return len(rows)


def _requests(opened: Opened, count: int) -> Iterator[dict[str, Any]]:
    given = 0
    fixed = [[{"role": "user", "content": prompt}] for prompt in FALLBACK_PROMPTS]
    for turns in [*conversations(opened.data, LOOKED_AT), *fixed]:
        while turns and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        if not turns:
            continue
        options = {"max_tokens": ANSWER_TOKENS, "temperature": 0}
        if opened.task.tokenizer.chat_template is None:
            request = {"prompt": "\n".join(turn["content"] for turn in turns), **options}
        else:
            request = {"messages": turns, **options}
        if 0 < len(_ids(opened.task.tokenizer, request)) <= LONGEST_PROMPT:
            yield request
            given += 1
        if given == count:
            return
    if not given:
        raise TrainerError(f"no conversation is short enough for a golden prompt of {LONGEST_PROMPT} tokens")


def _ids(tokenizer: Any, request: dict[str, Any]) -> list[int]:
    if "prompt" in request:
        found: list[int] = tokenizer(request["prompt"]).input_ids
        return found
    ids: list[int] = render(tokenizer, request["messages"])[0].tolist()
    return ids


@torch.no_grad()
def _answer(model: Any, tokenizer: Any, ids: list[int]) -> tuple[list[int], list[float]]:
    """(the greedy tokens, their log-probabilities) of the model's next turn."""
    device = next(model.parameters()).device
    prompt = torch.tensor([ids], device=device)
    made = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens: list[int] = made.sequences[0, len(ids) :].tolist()
    logprobs = [float(row[0].float().log_softmax(-1)[token]) for row, token in zip(made.logits, tokens, strict=True)]
    return tokens, logprobs

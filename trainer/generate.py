"""Answers of a language model: streamed to the terminal, or whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from trainer.language_model import render


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the likeliest token each time."""


def answer(model: Any, tokenizer: Any, messages: list[dict[str, str]], sampling: Sampling, streams: bool) -> str:
    """The model's next turn; with `streams` it is printed on stdout while it comes."""
    from transformers import TextStreamer

    device = next(model.parameters()).device
    ids = render(tokenizer, messages).to(device)
    options: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        options["temperature"] = sampling.temperature
    if streams:
        options["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ends = {model.generation_config.eos_token_id} if isinstance(model.generation_config.eos_token_id, int) else set()
    ends |= {tokenizer.eos_token_id} - {None}
    with torch.no_grad():
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **({"eos_token_id": sorted(ends)} if ends else {}),
            **options,
        )
    text: str = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return text

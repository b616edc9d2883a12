"""Without any trainer, in plain transformers and PEFT: what the contenders are held against, as JSON.

`python -m workloads.lora_plain WORK loss ADAPTER...`: held-out loss of the base model and of each adapter;
`... WORK memory`: bytes that are resident when the model has been loaded; `... WORK tokens`: of the training rows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from workloads.lora import Messages, Work, load, read, tokenise


def main(text: str, what: str, *adapters: str) -> None:
    work = Work.from_json(text)
    model, tokenizer = load(work)
    if what == "tokens":
        print(json.dumps(sum(len(tokenise(tokenizer, messages)["input_ids"]) for messages in read(work.train))))
        return
    if what == "memory":
        for weight in model.parameters():
            weight.detach().sum()  # else those of a mapped file are not yet read
        print(json.dumps(_resident()))
        return
    from peft import PeftModel

    rows = read(work.held_out)
    losses = [loss(model, tokenizer, rows)]
    for folder in adapters:
        adapted = PeftModel.from_pretrained(model, folder)
        losses.append(loss(adapted, tokenizer, rows))
        model = adapted.unload()
    print(json.dumps(losses))


@torch.inference_mode()
def loss(model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: list[Messages]) -> float:
    """Mean over the answers' tokens with the token that ends them, one row at a time, nats per token.

    The template's line feed after that token is not counted: trainers differ in whether they train on it.
    """
    model.eval()
    total, count = 0.0, 0
    for messages in rows:
        row = tokenise(tokenizer, messages)
        end = len(row["input_ids"]) - row["input_ids"][::-1].index(tokenizer.eos_token_id)
        ids, labels = (torch.tensor(row[key][:end]) for key in ("input_ids", "labels"))
        logits = model(input_ids=ids[None]).logits[0, :-1]
        total += float(nn.functional.cross_entropy(logits, labels[1:], reduction="sum"))
        count += int((labels[1:] >= 0).sum())
    return total / count


def _resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


if __name__ == "__main__":
    main(*sys.argv[1:])

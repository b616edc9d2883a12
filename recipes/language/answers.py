"""Answers to held-out prompts beside what stands in the data: to read, and measured."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipes.language import attention
from recipes.language.conversations import Conversations
from trainer.errors import UserError
from trainer.task import Difference

Score = Callable[[list[str], list[str]], float]
"""(answers, references) -> a value."""
Answer = dict[str, Any]
"""`place`, `prompt` (turns), `reference`, `answer`."""
SAMPLES = "samples.jsonl"
RESAMPLES = 200
"""Each measures all answers twice, and a user's metric may be slow."""
BATCH = 8
"""Prompts that are answered together."""


def exact_match(answers: list[str], references: list[str]) -> float:
    """Share of answers that are the reference, white space aside."""
    same = [a.split() == r.split() for a, r in zip(answers, references, strict=True)]
    return sum(same) / len(same)


def rouge_l(answers: list[str], references: list[str]) -> float:
    """Mean F1 of the longest common subsequence of words, lower case (Lin 2004, ROUGE-L per sample)."""
    scores = []
    for answer, reference in zip(answers, references, strict=True):
        one, other = (re.findall(r"\w+", text.lower()) for text in (answer, reference))
        common = _longest_common_subsequence(one, other)
        scores.append(2 * common / (len(one) + len(other)) if one or other else 1.0)
    return sum(scores) / len(scores)


def bleu(answers: list[str], references: list[str]) -> float:
    """Corpus BLEU of sacrebleu, 0 to 100 (Post 2018)."""
    import sacrebleu

    return float(sacrebleu.corpus_bleu(answers, [references]).score)


_SHIPPED: dict[str, Score] = {"exact_match": exact_match, "rouge_l": rouge_l, "bleu": bleu}


def find_metric(name: str) -> Score:
    """A shipped metric, or the user's own function by its dotted name. Raises UserError for another."""
    if name in _SHIPPED:
        return _SHIPPED[name]
    module, _, function = name.rpartition(".")
    if not module:
        raise UserError(
            f"recipe.answer_metrics: {name!r} is none of {', '.join(_SHIPPED)}, nor a dotted name of your own"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"recipe.answer_metrics: {name}: {error}") from error
    if not callable(found):
        raise UserError(f"recipe.answer_metrics: {name} is no function")
    score: Score = found
    return score


def answer(
    lm: Any,
    tokenizer: Any,
    conversations: Conversations,
    chosen: Sequence[int],
    max_new_tokens: int,
    beat: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """Let the model give the last turn of each chosen conversation, greedily; `beat` is called with each batch."""
    made: list[Answer] = []
    for index in chosen:
        conversation = conversations[index]
        turns = [{"role": turn.role, "content": turn.content} for turn in conversation.messages]
        made.append({"place": conversation.place, "prompt": turns[:-1], "reference": turns[-1]["content"]})
    with _as_usual(lm):
        for start in range(0, len(made), BATCH):
            beat()
            part = made[start : start + BATCH]
            for row, text in zip(
                part, _batch(lm, tokenizer, [row["prompt"] for row in part], max_new_tokens), strict=True
            ):
                row["answer"] = text
    return made


def choose(conversations: Conversations, count: int) -> list[int]:
    """Up to `count` conversations that end with the assistant's turn, spread over the split."""
    if conversations.is_text:
        raise UserError("recipe.answers: plain text has no turns to answer; set it to 0")
    spread = np.unique(np.linspace(0, len(conversations) - 1, min(count, len(conversations))).astype(int)).tolist()
    return [index for index in spread if conversations[index].messages[-1].role == "assistant"]


def compare(before: Path, after: Sequence[Answer], measures: Mapping[str, Score]) -> list[Difference]:
    """Each metric of the answers that `write` wrote into `before` and of those to the same prompts now.

    Intervals of 95 % by the percentile bootstrap over prompts, drawn together for both.
    """
    file = before / SAMPLES
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    earlier = {row["place"]: row["answer"] for row in map(json.loads, lines)}
    rows = [row for row in after if row["place"] in earlier]
    if not rows:
        return []
    texts = [(earlier[row["place"]], row["answer"], row["reference"]) for row in rows]
    draw = np.random.default_rng(0)
    draws = [range(len(texts)), *(draw.integers(0, len(texts), len(texts)) for _ in range(RESAMPLES))]
    return [
        _difference(name, measure, [[texts[i] for i in drawn] for drawn in draws]) for name, measure in measures.items()
    ]


def _difference(name: str, measure: Score, samples: list[list[tuple[str, str, str]]]) -> Difference:
    """The first sample is the real one."""
    values = np.array(
        [
            [measure(list(texts), list(wanted)) for texts in (old, new)]
            for old, new, wanted in (zip(*s, strict=True) for s in samples)
        ]
    )
    table = np.column_stack([values, values[:, 1] - values[:, 0]])
    ends = np.quantile(table[1:], [0.025, 0.975], axis=0)
    before, after, change = ((float(v), float(low), float(high)) for v, low, high in zip(table[0], *ends, strict=True))
    return Difference(name, before, after, change)


def write(answers: Sequence[Answer], folder: Path) -> None:
    """`samples.jsonl` for programs, `samples.md` to read."""
    (folder / SAMPLES).write_text("".join(f"{json.dumps(row)}\n" for row in answers), encoding="utf-8")
    parts = []
    for row in answers:
        prompt = "\n\n".join(f"**{turn['role']}**: {turn['content']}" for turn in row["prompt"])
        parts.append(
            f"## {row['place']}\n\n{prompt}\n\n**answer**: {row['answer']}\n\n**reference**: {row['reference']}\n"
        )
    (folder / "samples.md").write_text("\n".join(parts), encoding="utf-8")


def _batch(lm: Any, tokenizer: Any, prompts: list[list[dict[str, str]]], max_new_tokens: int) -> list[str]:
    texts = [tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) for turns in prompts]
    rows = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    longest, device = max(map(len, rows)), next(lm.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # On the left, so that each answer follows its prompt at once
    ids = torch.tensor([[pad or 0] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    options = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": pad}
    with torch.no_grad():
        made = lm.generate(input_ids=ids, attention_mask=mask, eos_token_id=tokenizer.eos_token_id, **options)
    return list(tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True))


@contextmanager
def _as_usual(lm: Any) -> Iterator[None]:
    """In evaluation mode, with transformers' own attention and its cache."""
    causal = lm.get_base_model() if hasattr(lm, "get_base_model") else lm
    before, trains = attention.of(causal), lm.training
    if before == attention.NAME:
        causal.set_attn_implementation(attention.SDPA)
    causal.config.use_cache = True
    lm.eval()
    try:
        yield
    finally:
        if before == attention.NAME:
            causal.set_attn_implementation(before)
        causal.config.use_cache = False
        lm.train(trains)


def _longest_common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    row = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for number, against in enumerate(other, 1):
            diagonal, row[number] = row[number], diagonal + 1 if word == against else max(row[number], row[number - 1])
    return row[-1]

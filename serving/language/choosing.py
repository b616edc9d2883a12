"""From logits to the next tokens: one row a sequence, each by its own sampling."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.language.sampling import Sampling

HEAD = 1024
"""Tokens that are looked at first for `top_p`: sorting a whole vocabulary takes milliseconds."""


@dataclass(frozen=True)
class Chosen:
    """A token and what was asked about it."""

    token: int
    logprob: float | None = None
    """Under the model itself, before temperature and penalties."""
    top: tuple[tuple[int, float], ...] = ()


class Chooser:
    """Chooses the tokens of one sequence. What it draws depends on its seed and logits, not on its neighbours."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._counts: dict[int, int] = {}
        self._generator = torch.Generator()
        self._generator.manual_seed(secrets.randbits(63) if sampling.seed is None else sampling.seed)

    @property
    def is_plain(self) -> bool:
        """The likeliest token as the model says it: the whole batch's can be found at once."""
        return self.sampling.is_greedy and not self.sampling.changes_logits

    def choose(self, logits: Tensor) -> int:
        """The next token by logits [V] in fp32 on the CPU, which may be changed."""
        sampling = self.sampling
        if sampling.changes_logits:
            logits = self._changed(logits)
        token = int(logits.argmax()) if sampling.is_greedy else self._drawn(logits / sampling.temperature)
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._counts[token] = self._counts.get(token, 0) + 1
        return token

    def _changed(self, logits: Tensor) -> Tensor:
        logits = logits.clone()
        for token, bias in self.sampling.logit_bias.items():
            logits[token] += bias
        if self._counts:
            seen = torch.tensor(list(self._counts))
            counts = torch.tensor(list(self._counts.values()), dtype=logits.dtype)
            logits[seen] -= counts * self.sampling.frequency_penalty + self.sampling.presence_penalty
        return logits

    def _drawn(self, logits: Tensor) -> int:
        sampling = self.sampling
        tokens: Tensor | None = None
        if 0 < sampling.top_k < len(logits):
            logits, tokens = logits.topk(sampling.top_k)
        probabilities = logits.softmax(-1)
        if sampling.min_p > 0:
            probabilities = probabilities.masked_fill(probabilities < sampling.min_p * probabilities.max(), 0)
        if sampling.top_p < 1:
            probabilities, order = _nucleus(probabilities, sampling.top_p)
            tokens = order if tokens is None else tokens[order]
        drawn = int(torch.multinomial(probabilities, 1, generator=self._generator))
        return drawn if tokens is None else int(tokens[drawn])


def choose(logits: Tensor, choosers: Sequence[Chooser]) -> list[Chosen]:
    """The next token of each row of logits [rows, V]."""
    likeliest = logits.argmax(-1).tolist()
    chosen = []
    for index, chooser in enumerate(choosers):
        wanted = chooser.sampling.logprobs
        row = None if chooser.is_plain and wanted is None else logits[index].float().cpu()
        token = likeliest[index] if chooser.is_plain or row is None else chooser.choose(row)
        chosen.append(Chosen(token) if wanted is None or row is None else _told(token, row, wanted))
    return chosen


def _told(token: int, logits: Tensor, count: int) -> Chosen:
    logprobs = logits.log_softmax(-1)
    top: tuple[tuple[int, float], ...] = ()
    if count:
        values, tokens = logprobs.topk(min(count, len(logprobs)))
        top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return Chosen(token, float(logprobs[token]), top)


def _nucleus(probabilities: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens that together have `share` of the probability: (probabilities, their tokens)."""
    share *= float(probabilities.sum())
    values, tokens = probabilities.topk(min(HEAD, len(probabilities)))
    if float(values.sum()) < share:
        values, tokens = probabilities.sort(descending=True)
    before = values.cumsum(-1) - values
    kept = max(1, int((before < share).sum()))
    return values[:kept], tokens[:kept]

"""How the next token of one sequence is chosen."""

from __future__ import annotations

import msgspec

GREEDY_BELOW = 1e-5
"""A temperature that divides to infinity takes the likeliest token."""


class Sampling(msgspec.Struct, frozen=True):
    """What a request may say about it; the names are OpenAI's, `top_k` and `min_p` vLLM's."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: of all."""
    min_p: float = 0.0
    """Tokens below this share of the likeliest one's probability are left out."""
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """How many of the likeliest tokens are told with each; 0 tells the chosen one alone, None none."""

    @property
    def is_greedy(self) -> bool:
        """The likeliest token each time."""
        return self.temperature < GREEDY_BELOW

    @property
    def changes_logits(self) -> bool:
        """Penalties or biases."""
        return bool(self.presence_penalty or self.frequency_penalty or self.logit_bias)

"""From what a client says to the tokens that a model reads."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace
from transformers import AutoTokenizer

from serving.errors import BadInput
from serving.language.messages import Ask
from serving.language.sampling import Sampling


class Prompts:
    """The tokenizer of a model's folder, and the bounds of the model."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        # Texts are encoded in another thread than they are decoded in, and a tokenizer is not for two.
        self._encoder = copy.deepcopy(self.tokenizer)
        self.context = 0
        """Tokens that a prompt and its answer may have together."""
        self.vocabulary = 0
        """Tokens that the model knows."""

    @property
    def longest_token(self) -> int:
        """Characters."""
        return max((len(token) for token in self.tokenizer.get_vocab()), default=1)

    def encode(self, text: str) -> list[int]:
        """A prompt of plain text, with the special tokens that the tokenizer puts around one."""
        return list(self._encoder(text).input_ids)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """A conversation by the model's chat template, open for an answer.

        Raises BadInput for what the template refuses, e.g. a role that it does not know.
        """
        if self._encoder.chat_template is None:
            raise BadInput("messages", "this model has no chat template; use /v1/completions")
        from jinja2 import TemplateError

        try:
            text = self._encoder.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            first = str(error).strip().partition("\n")[0]
            raise BadInput("messages", f"the model's chat template refuses them: {first}") from error
        return list(self._encoder(text, add_special_tokens=False).input_ids)

    def parse(self, ask: Ask) -> tuple[list[int], Sampling]:
        """The prompt's tokens, and the sampling with the number of tokens that fit.

        Raises BadInput for what does not fit the model.
        """
        if ask.messages is not None:
            field, tokens = "messages", self.encode_chat(ask.messages)
        elif isinstance(ask.prompt, list):
            field, tokens = "prompt", list(ask.prompt)
            if not all(0 <= token < self.vocabulary for token in tokens):
                raise BadInput(field, f"a token that this model does not have; it has 0 to {self.vocabulary - 1}")
        else:
            field, tokens = "prompt", self.encode(ask.prompt or "")
        if not tokens:
            raise BadInput(field, "has no tokens")
        left, wanted = self.context - len(tokens), ask.sampling.max_tokens
        if left < max(wanted, 1):
            rest = f" and {wanted} more are asked for" if wanted else ""
            raise BadInput(field, f"has {len(tokens)} tokens{rest}; this model takes {self.context} in all")
        if wrong := [token for token in ask.sampling.logit_bias if not 0 <= token < self.vocabulary]:
            raise BadInput("logit_bias", f"token {wrong[0]} is not there; the model has 0 to {self.vocabulary - 1}")
        return tokens, replace(ask.sampling, max_tokens=wanted or left)

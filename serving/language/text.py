"""Tokens become text while they come: characters that are split over tokens, and stop strings that are, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\ufffd"
LONGEST_CHARACTER = 4
"""Bytes, and so tokens, that one character can be spread over."""


class Decoder:
    """The text of one sequence. A character whose last bytes have not come yet is held back."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._done = 0
        """Tokens whose text was given out; the few before them are decoded again, since text may depend on them."""
        self._from = 0

    def push(self, token: int) -> str:
        """The text that is certain with this token; often empty for one that holds a part of a character."""
        self._tokens.append(token)
        before, after = self._texts()
        if after.endswith(INCOMPLETE) and len(self._tokens) - self._done <= LONGEST_CHARACTER:
            return ""
        return self._give(before, after)

    def flush(self) -> str:
        """What was held back."""
        return self._give(*self._texts())

    def _texts(self) -> tuple[str, str]:
        return self._decode(self._tokens[self._from : self._done]), self._decode(self._tokens[self._from :])

    def _give(self, before: str, after: str) -> str:
        self._from, self._done = self._done, len(self._tokens)
        return after[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        if not tokens:
            return ""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class Stops:
    """Looks for strings that end an answer. Text that may be the beginning of one is held back."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = [string for string in strings if string]
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may be given out, and whether a stop string has ended it."""
        if not self._strings:
            return text, False
        held = self._held + text
        found = [at for string in self._strings if (at := held.find(string)) >= 0]
        if found:
            self._held = ""
            return held[: min(found)], True
        keep = max(_overlap(held, string) for string in self._strings)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def flush(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of `text` with which `string` begins."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0

"""From turns to text by a chat template, with the parts that the assistant says.

A template with `{% generation %}` says itself where the assistant speaks. Of any other it is found by comparing two
renderings: the conversation, and the same with the assistant's words replaced by marks. What lies between the words is
the same in both, also where a template rewrites earlier turns (Qwen3 drops their thoughts), where prefixes differ.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from recipes.language.conversations import BadRow, Conversation, Message
from trainer.errors import UserError

Span = tuple[int, int]
"""First character and the one behind the last."""
Turns = list[dict[str, str]]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ENDER = re.compile(r"end|eot|eom|eos|</s>", re.IGNORECASE)
"""Special tokens that end something, by their names."""
_MARK = "Xq{}Zv"
"""Stands for the words of turn {}: letters and figures only, which no template trims, escapes or splits."""


class Renderer:
    """A tokenizer's chat template, or another one in its place."""

    def __init__(self, tokenizer: Any, template: str | None) -> None:
        """Raises UserError where there is no template."""
        self._template = template if template is not None else _own_template(tokenizer)
        self._special = dict(tokenizer.special_tokens_map)
        self.has_marks = _GENERATION.search(self._template) is not None
        self._prompt: str | None = None
        self._endings: dict[int, str | None] = {}
        self._enders = [
            str(token)
            for token in tokenizer.all_special_tokens
            if str(token) == tokenizer.eos_token or _ENDER.search(str(token))
        ]

    @property
    def template(self) -> str:
        return self._template

    def text(self, conversation: Conversation) -> str:
        """The conversation as one text. Raises BadRow where the template refuses it."""
        return self._render(_turns(conversation), conversation.place)

    def text_and_spans(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The conversation as one text, and where the assistant speaks, up to the sign that ends its turn.

        Raises BadRow where the template refuses the conversation, UserError where the assistant's words can't be
        found in what the template makes of them.
        """
        turns = _turns(conversation)
        if self.has_marks:
            return self._render_marked(turns, conversation.place)
        text = self._render(turns, conversation.place)
        speaks = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
        masked = [
            {**turn, "content": _MARK.format(number)} if number in speaks else turn for number, turn in enumerate(turns)
        ]
        between = self._split(self._render(masked, conversation.place), speaks, conversation.place)
        words = [turns[number]["content"] for number, _ in between[1:]]
        found = _locate(text, [piece for _, piece in between], words)
        if found is None:
            raise UserError(
                f"{conversation.place}: the chat template changes what the assistant says, and where it stands can't "
                f"be told; give a template with {{% generation %}} marks, or set recipe.train_on=all"
            )
        prompt = self._generation_prompt(turns, speaks[0])
        if any(prompt in turn["content"] for turn in turns):
            prompt = ""  # somebody writes it out: which one is the template's can't be told
        spans = []
        for (start, end), (_, before), (_, after) in zip(found, between, between[1:], strict=False):
            spans.append((start - _tail(before, prompt), end + self._ending(after, turns, speaks[0])))
        return text, spans

    def _split(self, text: str, speaks: Sequence[int], place: str) -> list[tuple[int, str]]:
        """The text between the marks: (turn that ends there, piece), the first of turn -1."""
        pieces, last, turn = [], 0, -1
        for number in speaks:
            mark = _MARK.format(number)
            count = text.count(mark)
            if count == 0:
                continue  # the template leaves the turn out
            at = text.find(mark)
            if count > 1 or at < last:
                raise UserError(
                    f"{place}: the chat template repeats or reorders what the assistant says; give a template with "
                    f"{{% generation %}} marks, or set recipe.train_on=all"
                )
            pieces.append((turn, text[last:at]))
            last, turn = at + len(mark), number
        if turn == -1:
            raise UserError(f"{place}: the chat template leaves out what the assistant says")
        return [*pieces, (turn, text[last:])]

    def _generation_prompt(self, turns: Turns, first: int) -> str:
        """What the template puts before the assistant speaks: the model does not have to say that."""
        if self._prompt is None:
            try:
                before = self._render(turns[:first], "", prompt=False)
                asked = self._render(turns[:first], "", prompt=True)
            except BadRow:  # it begins with the assistant, say
                return ""
            self._prompt = asked.removeprefix(before) if asked.startswith(before) else ""
        return self._prompt

    def _ending(self, after: str, turns: Turns, first: int) -> int:
        """Length of the sign that ends the assistant's turn, at the beginning of `after`; blanks behind it are none."""
        if first not in self._endings:
            short = [*turns[:first], {**turns[first], "content": _MARK.format(first)}]
            try:
                _, mark, ending = self._render(short, "").rpartition(_MARK.format(first))
                self._endings = {first: (ending.rstrip() or ending) if mark else None}
            except BadRow:
                self._endings = {first: None}
        sign = self._endings[first]
        if sign is not None and after.startswith(sign):
            return len(sign)
        # Another sign than at the end of a conversation: gpt-oss has <|return|> there and <|end|> between turns.
        blank = len(after) - len(after.lstrip())
        return max((blank + len(token) for token in self._enders if after.startswith(token, blank)), default=0)

    def _render(self, turns: Turns, place: str, prompt: bool = False) -> str:
        return self._call(turns, place, add_generation_prompt=prompt)[0]

    def _render_marked(self, turns: Turns, place: str) -> tuple[str, list[Span]]:
        text, spans = self._call(turns, place, return_assistant_tokens_mask=True)
        return text, [(start, end) for start, end in spans if end > start]

    def _call(self, turns: Turns, place: str, **options: Any) -> tuple[str, list[Span]]:
        from jinja2 import TemplateError, TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                conversations=[turns], chat_template=self._template, **self._special, **options
            )
        except TemplateSyntaxError as error:
            raise UserError(f"recipe.chat_template: line {error.lineno}: is no Jinja: {error.message}") from error
        except TemplateError as error:
            raise BadRow(f"{place}: the chat template refuses the conversation: {error}") from error
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise BadRow(f"{place}: the chat template fails on the conversation: {error}") from error
        (text,), spans = rendered
        return str(text), spans[0] if spans else []


def _own_template(tokenizer: Any) -> str:
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        template = None
    if not template:
        raise UserError(
            "recipe.chat_template: the tokenizer has no chat template; set it to the file of a Jinja template, "
            "e.g. chat_template.jinja of the instruction-tuned model of this family"
        )
    return str(template)


def _turns(conversation: Conversation) -> Turns:
    return [_plain(message) for message in conversation.messages]


def _plain(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}


def _tail(before: str, prompt: str) -> int:
    """How many characters of `before` the assistant says itself: what stands behind the generation prompt.

    Qwen3's template puts an empty `<think></think>` before an answer without thoughts, which the model has to say.
    """
    if not prompt or prompt not in before:
        return 0
    return len(before) - before.rindex(prompt) - len(prompt)


def _locate(text: str, between: Sequence[str], words: Sequence[str]) -> list[Span] | None:
    """Where the words stand between the pieces of text that surround them; None where that is not certain."""
    for change in (str, str.strip, str.rstrip, str.lstrip):  # what templates do to words, the most frequent first
        said = [change(word) for word in words]
        if "".join(part for pair in zip(between, [*said, ""], strict=True) for part in pair) == text:
            return _spans(between, [len(word) for word in said])
    if not text.startswith(between[0]) or not text.endswith(between[-1]):
        return None
    lengths, at = [], len(between[0])
    limit = len(text) - len(between[-1])
    for piece in between[1:-1]:
        found = text.find(piece, at, limit)
        if found < 0 or text.find(piece, found + 1, limit) >= 0:
            return None  # not there, or in two places
        lengths.append(found - at)
        at = found + len(piece)
    return _spans(between, [*lengths, limit - at]) if limit >= at else None


def _spans(between: Sequence[str], lengths: Sequence[int]) -> list[Span]:
    spans, at = [], 0
    for piece, length in zip(between, lengths, strict=False):
        at += len(piece)
        spans.append((at, at + length))
        at += length
    return spans

"""Requests in OpenAI's form: what is taken, what is refused and how it is told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serving.errors import BadInput
from serving.language.requests import Chat, Completion, chat_asks, completion_asks, parse

HELLO = [{"role": "user", "content": "Hello"}]


def _chat(**fields: Any) -> Chat:
    return parse(json.dumps({"model": "m", "messages": HELLO, **fields}).encode(), Chat)


def _completion(**fields: Any) -> Completion:
    return parse(json.dumps({"model": "m", "prompt": "Hello", **fields}).encode(), Completion)


def test_defaults_are_openai_s() -> None:
    (ask,) = chat_asks(_chat(), "red")
    assert (ask.messages, ask.adapter, ask.sampling.max_tokens) == (HELLO, "red", 0)
    assert (ask.sampling.temperature, ask.sampling.top_p, ask.sampling.logprobs) == (1.0, 1.0, None)
    (ask,) = completion_asks(_completion(), None)
    assert (ask.prompt, ask.sampling.max_tokens) == ("Hello", 16)


def test_choices_and_prompts_are_one_sequence_each() -> None:
    asks = completion_asks(_completion(prompt=["a", "b"], n=2, seed=7), None)
    assert [(ask.prompt, ask.sampling.seed) for ask in asks] == [("a", 7), ("a", 8), ("b", 7), ("b", 8)]
    assert [ask.prompt for ask in completion_asks(_completion(prompt=[5, 6]), None)] == [[5, 6]]
    assert [ask.prompt for ask in completion_asks(_completion(prompt=[[5], [6, 7]]), None)] == [[5], [6, 7]]


def test_parts_of_text_and_the_newer_name_of_a_role() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (ask,) = chat_asks(
        _chat(messages=[{"role": "developer", "content": "x"}, {"role": "user", "content": parts}]), None
    )
    assert ask.messages == [{"role": "system", "content": "x"}, {"role": "user", "content": "ab"}]


def test_what_changes_nothing_is_passed_over() -> None:
    chat_asks(_chat(user="u", metadata={"a": "b"}, tools=[], response_format={"type": "text"}, store=False), None)


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"temperature": "hot"}, "temperature", "expected `float"),
        ({"temperature": 3}, "temperature", "<= 2"),
        ({"top_p": 0}, "top_p", "> 0"),
        ({"max_tokens": 0}, "max_tokens", ">= 1"),
        ({"max_tokens": 1.5}, "max_tokens", "expected `int"),
        ({"n": 17}, "n", "<= 16"),
        ({"seed": 1 << 70}, "seed", ""),
        ({"stop": ""}, "stop", "1 to 256 characters"),
        ({"stop": ["a"] * 17}, "stop", "up to 16"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "no number of a token"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "<= 100"),
        ({"messages": []}, "messages", "length >= 1"),
        ({"messages": [{"content": "x"}]}, "messages[0]", "missing required field `role`"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", "text only"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "only text"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs: true"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"model": None}, "model", "expected `str`"),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        chat_asks(_chat(**fields), None)
    assert caught.value.field == field and message in caught.value.message
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": ["a"] * 9, "n": 2}, "prompt"),
        ({"prompt": [[1.5]]}, "prompt[0][0]"),
        ({"prompt": [1 << 70]}, "prompt[0]"),
        ({"prompt": [[3], [-1]]}, "prompt[1][0]"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_a_bad_completion_is_named(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(BadInput) as caught:
        completion_asks(_completion(**fields), None)
    assert caught.value.field == field


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000])
def test_a_body_that_is_no_request(body: bytes) -> None:
    with pytest.raises(BadInput):
        parse(body, Chat)
    with pytest.raises(BadInput, match="model"):
        parse(b"{}", Chat)

"""Text of tokens that come one by one: split characters, stop strings over the borders of tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm import tiny

from serving.language.text import Decoder, Stops

TOKENIZER = tiny.tokenizer()  # a token a byte


def _decoded(text: str) -> list[str]:
    decoder = Decoder(TOKENIZER)
    pieces = [decoder.push(token) for token in TOKENIZER(text, add_special_tokens=False).input_ids]
    return [*pieces, decoder.flush()]


def test_a_character_comes_with_its_last_byte() -> None:
    assert _decoded("aé漢🙂") == ["a", "", "é", "", "", "漢", "", "", "", "🙂", ""]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20))
def test_pieces_make_the_whole_text(text: str) -> None:
    assert "".join(_decoded(text)) == text


def test_bytes_that_are_no_text_are_not_held_back_for_ever() -> None:
    decoder = Decoder(TOKENIZER)
    broken = TOKENIZER.convert_tokens_to_ids("ÿ")  # the byte 0xff
    pieces = [decoder.push(broken) for _ in range(20)]
    assert any(pieces) and "".join([*pieces, decoder.flush()]).count("\ufffd") == 20


def test_special_tokens_are_no_text() -> None:
    decoder = Decoder(TOKENIZER)
    assert [decoder.push(token) for token in (3, *TOKENIZER("a").input_ids, 4)] == ["", "a", ""]


@pytest.mark.parametrize(
    ("strings", "pieces", "said", "is_stopped"),
    [
        (["END"], ["say E", "N", "D more"], "say ", True),
        (["END"], ["E", "N", "d"], "ENd", False),
        (["aab"], ["a", "a", "a", "b"], "a", True),
        (["xyz", "z"], ["x", "y", "z"], "", True),
        ([], ["a", "b"], "ab", False),
        (["é"], ["caf", "é"], "caf", True),
    ],
)
def test_stop_strings_over_pieces(strings: list[str], pieces: list[str], said: str, is_stopped: bool) -> None:
    stops, text, stopped = Stops(strings), "", False
    for piece in pieces:
        more, stopped = stops.push(piece)
        text += more
        if stopped:
            break
    assert (text + ("" if stopped else stops.flush()), stopped) == (said, is_stopped)


@settings(max_examples=200, deadline=None)
@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(1, 3))
def test_stops_find_what_a_look_at_the_whole_text_finds(text: str, strings: list[str], size: int) -> None:
    stops, said, stopped = Stops(strings), "", False
    for start in range(0, len(text), size):
        more, stopped = stops.push(text[start : start + size])
        said += more
        if stopped:
            break
    said += "" if stopped else stops.flush()
    found = [at for string in strings if (at := text.find(string)) >= 0]
    assert stopped == bool(found)
    # Of several in one piece the first in the text counts; one that ends in an earlier piece is found there.
    assert text.startswith(said) and (not stopped or not any(string in said for string in strings))
    if size == 1 or not found:
        ends = [text.find(s) + len(s) for s in strings if s in text]
        assert len(said) <= (min(ends) if ends else len(text))

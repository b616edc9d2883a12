"""Messages arrive as they were sent, however the stream is cut, and arrays without being copied."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import BadInput
from serving.inputs import Encoded
from serving.workers.errors import Failed
from serving.workers.messages import Batch, Load, decode, encode, pack, size_of, unpack
from serving.workers.wire import ALIGNMENT, SCRATCH, Reader, frame


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.binary(max_size=40), st.integers(0, 3 * SCRATCH)), max_size=6),
    st.lists(st.integers(1, 2 * SCRATCH), min_size=1, max_size=20),
)
def test_messages_survive_any_cut(messages: list[tuple[bytes, int]], cuts: list[int]) -> None:
    bodies = [(header, bytes([size % 251]) * size) for header, size in messages]
    stream = b"".join(frame(header, [body], len(body)) for header, body in bodies)
    reader, found, turn = Reader(), [], 0
    while stream:
        space = reader.space()
        assert len(space)
        count = min(len(space), len(stream), cuts[turn % len(cuts)])
        space[:count] = stream[:count]
        stream, turn = stream[count:], turn + 1
        found += [(bytes(header), bytes(body)) for header, body in reader.received(count)]
    assert found == bodies


def travelled(items: list[Any]) -> list[Any]:
    parts, buffers, size = pack(items)
    stream = encode(Batch(parts), buffers, size)
    reader = Reader()
    found: list[Any] = []
    while stream:
        space = reader.space()
        count = min(len(space), len(stream))
        space[:count], stream = stream[:count], stream[count:]
        for header, body in reader.received(count):
            message = decode(header)
            assert isinstance(message, Batch) and len(body) == size
            found = unpack(message.parts, body)
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return len(a) == len(b) and all(
            x.dtype == y.dtype and x.shape == y.shape and np.array_equal(x, y) for x, y in zip(a, b, strict=True)
        )
    if isinstance(a, BadInput):
        return (a.field, a.message, a.is_undecodable) == (b.field, b.message, b.is_undecodable)
    return a == b if isinstance(a, Encoded) else isinstance(b, Failed)


def test_samples_and_rows_of_every_kind_travel_in_their_order() -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (5, 7, 3), np.uint8) for _ in range(3)]
    items: list[Any] = [
        (pictures[0],),
        (pictures[1],),
        Encoded(b"\xff\xd8 no picture", "instances[2].b64"),
        (pictures[2],),
        (pictures[2].transpose(2, 0, 1),),  # not as memory lies
        BadInput("instances[4]", "shape [2]; expected 3", True),
        ValueError("of the program"),
        (np.float32(3.5), np.zeros((0, 4), np.int64), np.array([True, False, True])),
        (np.float32(4.5), np.ones((0, 4), np.int64), np.array([True, True, True])),
        (np.arange(3, dtype=np.float16), np.array(-7, np.int8)),
        (),
    ]
    found = travelled(items)
    assert len(found) == len(items)
    assert all(same(a, b) for a, b in zip(items, found, strict=True))


def test_alike_samples_are_one_stack_in_aligned_memory() -> None:
    rows = [(np.full((3, 5), i, np.float64), np.full(3, i, np.uint8)) for i in range(32)]
    parts, _, size = pack(rows)
    assert len(parts) == 1 and size % ALIGNMENT == 0
    found = travelled(rows)
    assert found[1][0].base is not None and found[0][0].flags.writeable
    assert all(row[0].__array_interface__["data"][0] % 8 == 0 for row in found)
    assert size_of(rows[0]) == 3 * 5 * 8 + 3
    assert not travelled([])


def test_a_large_message_is_not_copied_again() -> None:
    large = np.arange(SCRATCH, dtype=np.float64)
    (found,) = travelled([(large,)])
    assert np.array_equal(found[0], large)


def test_a_header_that_is_no_message_is_refused() -> None:
    import msgspec

    order = encode(Load("/x", "v", 1, False, "cpu", 32, True))
    reader = Reader()
    reader.space()[: len(order)] = order
    ((header, body),) = reader.received(len(order))
    assert isinstance(decode(header), Load) and not body
    with pytest.raises(msgspec.DecodeError):
        decode(memoryview(b"\x93\xa4oops\x01\x02"))

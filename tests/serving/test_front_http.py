"""HTTP on the wire: what is malformed, too large, too slow or too much, on real sockets before a small application."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from socket import create_connection, socket
from typing import Any

import pytest
import uvloop
from front_server import now, read_all, until

from serving.front.connection import MOST_HEAD_BYTES, MOST_HEADERS, Connection
from serving.front.http import Request, Response
from serving.front.wire import Limits, Wire

LIMITS = Limits(body=1000, buffered=100_000, connections=50)
GET = b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n"


class Echo:
    """Answers with the method, path and body; paths ending in `later` wait until they are let go."""

    def __init__(self) -> None:
        self.later: list[Request] = []
        self.cancelled = 0

    def admit(self, request: Request) -> Response | None:
        return Response(404, b"no") if request.path == b"/refused" else None

    def handle(self, request: Request) -> None:
        if request.path.endswith(b"later"):
            self.later.append(request)
            request.task = asyncio.get_running_loop().create_task(self._wait())
        elif request.path == b"/stream":
            request.task = asyncio.get_running_loop().create_task(self._stream(request))
        elif request.path == b"/large":
            request.respond(Response(200, bytes(20_000_000)))
        else:
            request.respond(self.answer(request))

    def answer(self, request: Request) -> Response:
        return Response(200, b"%b %b %b" % (request.method, request.path, request.body))

    def refuse(self, request: Request, status: int, message: str, headers: bytes) -> Response:
        return Response(status, message.encode(), b"text/plain", headers)

    async def _wait(self) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def _stream(self, request: Request) -> None:
        request.start_stream(200, b"text/plain")
        for part in (b"one ", b"two ", b"three"):
            await request.stream(part)
        request.end_stream()


class Running:
    """A wire on a loop in a thread."""

    def __init__(self, limits: Limits) -> None:
        self.app = Echo()
        self._limits = limits
        self._ready = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=lambda: uvloop.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(30)

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.wire = Wire(self.app, self._limits, self.loop)
        server = await self.loop.create_server(lambda: Connection(self.wire), "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        self.wire.close()
        server.close()
        await asyncio.sleep(0)

    def call(self, function: Callable[[], Any]) -> Any:
        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(30)

    def open(self) -> socket:
        return create_connection(("127.0.0.1", self.port), timeout=30)

    def send(self, *parts: bytes) -> bytes:
        """All that comes back until the server closes."""
        with self.open() as connection:
            for part in parts:
                connection.sendall(part)
            return read_all(connection)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)
        assert not self._thread.is_alive()


@contextmanager
def running(**changes: Any) -> Iterator[Running]:
    found = Running(dataclasses.replace(LIMITS, **changes))
    try:
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as found:
        yield found
        until(lambda: not found.wire.connections, "all connections closed")
        assert found.wire.buffered == 0


def closing(request: bytes) -> bytes:
    return request.replace(b"Host:", b"Connection: close\r\nHost:")


def post(body: bytes, *headers: bytes, path: bytes = b"/x") -> bytes:
    lines = [b"POST %b HTTP/1.1" % path, b"Host: h", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join([*lines, b"", body])


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


def test_answers_and_closes_as_asked(server: Running) -> None:
    answer = server.send(closing(GET))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 7\r\ndate: ")
    assert b"connection: close\r\n" in answer and answer.endswith(b"\r\n\r\nGET /x ")


def test_keeps_alive_and_answers_pipelined_requests_in_order(server: Running) -> None:
    requests = [post(b"%d" % i) for i in range(50)]
    answer = server.send(*requests, closing(GET))
    assert statuses(answer) == [200] * 51
    assert [int(part.split(b"\r\n\r\nPOST /x ")[1]) for part in answer.split(b"HTTP/1.1 ")[1:51]] == list(range(50))


def test_a_later_answer_holds_the_next_ones_back(server: Running) -> None:
    with server.open() as connection:
        connection.sendall(GET.replace(b"/x", b"/later") + GET * 3)
        until(lambda: server.app.later, "the first request")
        connection.sendall(GET + closing(GET))
        request = server.app.later.pop()
        server.call(lambda: request.respond(server.app.answer(request)))
        answer = read_all(connection)
    assert statuses(answer) == [200] * 6 and b"GET /later" in answer.split(b"HTTP/1.1 ")[1]


def test_thousands_of_pipelined_requests_take_no_stack(server: Running) -> None:
    with server.open() as connection:
        connection.sendall(GET.replace(b"/x", b"/later") + GET * 3000 + closing(GET))
        until(lambda: server.app.later, "the first request")
        request = server.app.later.pop()
        server.call(lambda: request.respond(server.app.answer(request)))
        assert statuses(read_all(connection)) == [200] * 3002


@pytest.mark.parametrize("size", [1, 3, 7])
def test_bytes_that_come_one_by_one(server: Running, size: int) -> None:
    data = post(b"body", b"Connection: close")
    assert server.send(*(data[i : i + size] for i in range(0, len(data), size))).endswith(b"POST /x body")


def test_http_1_0(server: Running) -> None:
    assert b"connection: close" in server.send(b"GET /x HTTP/1.0\r\n\r\n")
    kept = b"GET /x HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
    answer = server.send(kept, b"GET /x HTTP/1.0\r\n\r\n")
    assert statuses(answer) == [200, 200] and answer.count(b"connection: keep-alive") == 1
    answer = server.send(b"GET /stream HTTP/1.0\r\n\r\n")
    assert b"transfer-encoding" not in answer and answer.endswith(b"one two three")


def test_head_has_the_length_and_no_body(server: Running) -> None:
    answer = server.send(closing(GET).replace(b"GET", b"HEAD"))
    assert b"content-length: 8\r\n" in answer and answer.endswith(b"\r\n\r\n")


def test_chunked_both_ways(server: Running) -> None:
    head = b"POST /x HTTP/1.1\r\nHost: h\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert server.send(head, b"3\r\nabc\r\n", b"2;x=y\r\nde\r\n0\r\nTrailer: t\r\n\r\n").endswith(b"POST /x abcde")
    answer = server.send(closing(GET).replace(b"/x", b"/stream"))
    assert answer.endswith(b"4\r\none \r\n4\r\ntwo \r\n5\r\nthree\r\n0\r\n\r\n")


def test_expect_100_continue(server: Running) -> None:
    with server.open() as connection:
        connection.sendall(post(b"", b"Expect: 100-continue", b"Connection: close").replace(b"h: 0", b"h: 4"))
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"body")
        assert read_all(connection).endswith(b"POST /x body")
    head = post(b"", b"Expect: 100-continue").replace(b"h: 0", b"h: 4000")
    assert statuses(server.send(head)) == [413]
    assert statuses(server.send(head.replace(b"4000", b"4").replace(b"/x", b"/refused"))) == [404]
    assert statuses(server.send(head.replace(b"4000", b"4").replace(b"100-continue", b"magic"))) == [417]


def test_a_huge_body_is_refused_before_it_comes(server: Running) -> None:
    began = now()
    answer = server.send(post(b"").replace(b"Length: 0", b"Length: 1073741824"))
    assert statuses(answer) == [413] and b"connection: close" in answer and now() - began < 5


def test_a_refused_body_that_comes_all_the_same_is_not_kept(server: Running) -> None:
    with server.open() as connection:
        connection.sendall(post(b"").replace(b"Length: 0", b"Length: 1073741824"))
        sent = 0
        try:
            for _ in range(20):
                connection.sendall(bytes(100_000))
                sent += 1
        except OSError:  # the server may close while we send
            pass
        assert sent and server.wire.buffered == 0


def test_a_chunked_body_is_counted_while_it_comes(server: Running) -> None:
    head = b"POST /x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = server.send(head, *[b"64\r\n" + bytes(100) + b"\r\n"] * 10, b"1\r\nx\r\n")
    assert statuses(answer) == [413]


def test_a_refused_request_keeps_its_connection(server: Running) -> None:
    answer = server.send(post(b"x" * 900, path=b"/refused"), closing(GET))
    assert statuses(answer) == [404, 200]


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\x00\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /x HTTP/9.9\r\n\r\n",
        b"GET /x HTTP/1.1\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: h\r\nNo colon\r\n\r\n",
        b"GET /x HTTP/1.1\r\nHost: h\r\nA: \x00\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: x\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: -1\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_what_is_no_http_is_told_and_closed(server: Running, data: bytes) -> None:
    answer = server.send(data)
    assert statuses(answer) == [400] and b"connection: close" in answer


def test_a_good_request_before_a_malformed_one_is_answered(server: Running) -> None:
    assert statuses(server.send(GET + b"nonsense\r\n\r\n" + GET)) == [200, 400]


@pytest.mark.parametrize("many", [True, False])
def test_too_much_of_headers(server: Running, many: bool) -> None:
    lines = (
        b"".join(b"h%d: x\r\n" % i for i in range(MOST_HEADERS + 1)) if many else b"h: %b\r\n" % bytes(b"x" * 40_000)
    )
    assert statuses(server.send(b"GET /x HTTP/1.1\r\nHost: h\r\n" + lines + b"\r\n")) == [431]


def test_headers_without_end(server: Running) -> None:
    with server.open() as connection:
        connection.sendall(b"GET /x HTTP/1.1\r\nHost: h\r\nh: ")
        for _ in range(MOST_HEAD_BYTES // 4096 + 2):
            connection.sendall(b"x" * 4096)
        assert statuses(read_all(connection)) == [431]


def test_an_upgrade_is_answered_in_plain_http(server: Running) -> None:
    answer = server.send(GET.replace(b"Host:", b"Connection: Upgrade\r\nUpgrade: h2c\r\nHost:"))
    assert statuses(answer) == [200]


def test_slow_headers_and_bodies_get_a_408() -> None:
    with running(head_seconds=0.3, body_seconds=0.3) as server:
        with server.open() as connection:
            connection.sendall(b"GET /x HTTP/1.1\r\nHost:")
            assert statuses(read_all(connection)) == [408]
        with server.open() as connection:
            connection.sendall(post(b"abc")[:-1])
            assert statuses(read_all(connection)) == [408]
        assert server.wire.buffered == 0


def test_dripping_does_not_win_time() -> None:
    with running(head_seconds=1.0) as server, server.open() as connection:
        connection.sendall(b"GET /x HTTP/1.1\r\nHost: h\r\n")
        connection.settimeout(0.05)
        began, answer = now(), b""
        while not answer and now() - began < 20:
            connection.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                answer = connection.recv(1000)
        assert statuses(answer) == [408] and now() - began < 10


def test_idle_connections_are_closed_without_a_word() -> None:
    with running(idle_seconds=0.3) as server:
        assert server.send(GET).count(b"HTTP/1.1 200") == 1
        assert server.send() == b""


def test_a_client_that_does_not_read_is_cut_off() -> None:
    with running(write_seconds=0.3, idle_seconds=0.3) as server, server.open() as connection:
        connection.sendall(GET.replace(b"/x", b"/large"))
        until(lambda: server.wire.connections, "the connection")
        until(lambda: not server.wire.connections, "its end", 20)


def test_a_client_that_hangs_up_cancels_its_request(server: Running) -> None:
    before = server.app.cancelled
    with server.open() as connection:
        connection.sendall(GET.replace(b"/x", b"/later"))
        until(lambda: server.app.later, "the request")
        server.app.later.pop()
    until(lambda: server.app.cancelled == before + 1, "the cancellation")


def test_all_places_taken_by_silent_clients_are_given_to_others() -> None:
    with running(connections=10) as server:
        silent = [server.open() for _ in range(10)]
        for connection in silent:
            connection.sendall(b"GET /x HT")
        until(lambda: len(server.wire.connections) == 10, "ten connections")
        began = now()
        until(lambda: statuses(server.send(closing(GET))) == [200], "a place", 20)
        assert now() - began < 10
        for connection in silent:
            connection.close()


def test_all_places_taken_by_busy_clients_are_kept() -> None:
    with running(connections=3) as server:
        busy = [server.open() for _ in range(3)]
        for connection in busy:
            connection.sendall(GET.replace(b"/x", b"/later"))
        until(lambda: len(server.app.later) == 3, "three requests")
        answer = server.send(GET)
        assert statuses(answer) == [503] and b"retry-after: 1" in answer
        for request in server.app.later:
            server.call(lambda request=request: request.respond(server.app.answer(request)))
        assert all(statuses(connection.recv(1000)) == [200] for connection in busy)
        for connection in busy:
            connection.close()


def test_all_bodies_together_are_bounded() -> None:
    with running(buffered=1500) as server:
        with server.open() as first:
            first.sendall(post(b"x" * 900)[:-1])
            until(lambda: server.wire.buffered == 899, "the first body")
            answer = server.send(post(b"x" * 900))
            assert statuses(answer) == [503] and b"retry-after" in answer
            first.sendall(b"x")
            assert statuses(first.recv(1000)[:20]) == [200]
        until(lambda: server.wire.buffered == 0, "nothing held")


def test_draining_answers_what_has_begun() -> None:
    with running() as server:
        with server.open() as idle, server.open() as busy, server.open() as half:
            idle.sendall(GET)
            assert statuses(idle.recv(1000)) == [200]
            busy.sendall(GET.replace(b"/x", b"/later"))
            half.sendall(post(b"abc")[:-1])
            until(lambda: server.app.later and server.wire.buffered == 2, "both")
            server.call(server.wire.drain)
            assert idle.recv(100) == b""
            assert server.call(server.wire.unanswered) == 2
            half.sendall(b"c")
            answer = read_all(half)
            assert answer.endswith(b"POST /x abc") and b"connection: close" in answer
            request = server.app.later.pop()
            server.call(lambda: request.respond(server.app.answer(request)))
            assert read_all(busy).endswith(b"GET /later ")
        until(lambda: server.call(server.wire.unanswered) == 0, "the end")

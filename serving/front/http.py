"""What a request and an answer are, on the wire and off it."""

from __future__ import annotations

import asyncio
import http
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from serving.front.connection import Connection

JSON = b"application/json"
TEXT = b"text/plain; charset=utf-8"


class Response(NamedTuple):
    """An answer that is whole."""

    status: int
    body: bytes
    content_type: bytes = JSON
    headers: bytes = b""
    """More header lines, each with its end: `b"retry-after: 1\\r\\n"`."""
    closes: bool = False
    """The connection can't be used any more: the rest of the request was not read."""


class Request:
    """One request, from its first byte to the last one of its answer."""

    __slots__ = (
        "body",
        "connection",
        "expects",
        "extra",
        "headers",
        "http10",
        "id",
        "is_chunked",
        "keep_alive",
        "key",
        "method",
        "path",
        "query",
        "refusal",
        "route",
        "started",
        "streams",
        "task",
        "url",
    )

    def __init__(self, connection: Connection, started: float) -> None:
        self.connection = connection
        self.started = started
        """`time.monotonic()` of its first byte."""
        self.method = b""
        self.url = b""
        self.path = b""
        """As sent, percent-encoded, without the query."""
        self.query = b""
        self.headers: dict[bytes, bytes] = {}
        """By name in lower case; values of a name that came twice are joined by a comma."""
        self.body = b""
        self.id = b""
        self.keep_alive = True
        self.http10 = False
        self.expects = False
        self.is_chunked = False
        self.refusal: Response | None = None
        self.route: Any = None
        """What the application keeps from admission to handling."""
        self.extra = b""
        """Header lines that every answer to this request has, each with its end."""
        self.task: asyncio.Task[None] | None = None
        """What works on the answer; cancelled when the client hangs up."""
        self.key = ""
        """Name of the API key."""
        self.streams = False

    @property
    def client(self) -> str:
        """Address of the other end, without the port; empty where there is none."""
        return self.connection.client

    def respond(self, response: Response) -> None:
        """Send the whole answer. Does nothing when the client has gone."""
        status, body, content_type, headers, closes = response
        if closes:
            self.keep_alive = False
        parts = [
            _status_line(status),
            content_type,
            b"\r\ncontent-length: %d\r\n" % len(body),
            self.connection.wire.date,
            self.extra,
            headers,
            self._connection_header(),
            b"\r\n",
            b"" if self.method == b"HEAD" else body,
        ]
        self.connection.send(b"".join(parts))
        self.connection.finish(self)

    def start_stream(self, status: int, content_type: bytes, headers: bytes = b"") -> None:
        """Begin an answer whose length is not known; then `stream`, and `end_stream` at last."""
        self.streams = True
        if self.http10:
            self.keep_alive = False  # its end is the connection's
        framing = b"" if self.http10 else b"transfer-encoding: chunked\r\n"
        parts = [_status_line(status), content_type, b"\r\n", framing, self.connection.wire.date, self.extra, headers]
        self.connection.send(b"".join([*parts, self._connection_header(), b"\r\n"]))

    async def stream(self, data: bytes) -> None:
        """Send a part; waits while the client does not read. Raises ConnectionResetError when it has gone."""
        if self.connection.is_lost:
            raise ConnectionResetError("the client has hung up")
        if data and self.method != b"HEAD":
            self.connection.send(data if self.http10 else b"%x\r\n%b\r\n" % (len(data), data))
            await self.connection.writable()

    def end_stream(self) -> None:
        """The answer is whole."""
        if not self.http10 and self.method != b"HEAD":
            self.connection.send(b"0\r\n\r\n")
        self.connection.finish(self)

    def break_off(self) -> None:
        """End a stream that can't be completed, so that the client sees that it was cut."""
        self.keep_alive = False
        self.connection.finish(self)

    def _connection_header(self) -> bytes:
        if not self.keep_alive:
            return b"connection: close\r\n"
        return b"connection: keep-alive\r\n" if self.http10 else b""


def _status_line(status: int) -> bytes:
    line = _STATUS_LINES.get(status)
    return line if line is not None else b"HTTP/1.1 %d Unknown\r\ncontent-type: " % status


_STATUS_LINES = {s.value: b"HTTP/1.1 %d %b\r\ncontent-type: " % (s.value, s.phrase.encode()) for s in http.HTTPStatus}

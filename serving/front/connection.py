"""HTTP/1.1 over a connection: httptools parses; what is too large, too slow or malformed ends here.

A request is refused as soon as its headers are known, and its body is counted while it is read. Answers come in the
order of the requests: the next one waits until the last one is answered.
"""

from __future__ import annotations

import asyncio
from collections import deque
from enum import IntEnum
from time import monotonic
from typing import TYPE_CHECKING, cast

import httptools

from serving.front.http import Request, Response

if TYPE_CHECKING:
    from serving.front.wire import Wire

MOST_HEAD_BYTES = 32 << 10
MOST_HEADERS = 100


class Phase(IntEnum):
    """What a connection waits for."""

    IDLE = 0
    """The next request."""
    HEAD = 1
    BODY = 2
    ANSWER = 3
    """The application."""
    LINGER = 4
    """The client's end: it has its last answer, and may still be sending."""


class Connection(asyncio.Protocol):
    """One client's connection."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.client = ""
        self.phase = Phase.IDLE
        self.since = 0.0
        """`time.monotonic()` of the phase's beginning."""
        self.is_lost = False
        self._parser = httptools.HttpRequestParser(self)
        self._reading: Request | None = None
        self._chunks: list[bytes] = []
        self._body_bytes = 0
        self._kept_bytes = 0
        self._raw_bytes = 0
        self._active: Request | None = None
        self._waiting: deque[Request] = deque()
        self._held = b""
        self._is_pumping = False
        self._drained: asyncio.Future[None] | None = None

    # What the transport says.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.since = monotonic()
        peer = transport.get_extra_info("peername")
        self.client = str(peer[0]) if isinstance(peer, tuple) else ""
        self.wire.accept(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        self.wire.connections.discard(self)
        self._release(self._kept_bytes)
        for request in [self._active, *self._waiting]:
            if request is not None:
                self._release(len(request.body))
                if request.task is not None:
                    request.task.cancel()
        self._waiting.clear()
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        if self._active is not None:
            self._held += data
            self._transport.pause_reading()
        elif self.phase != Phase.LINGER:
            self._feed(data)

    def eof_received(self) -> bool:
        # Closed, or its sending side alone: the two look alike, and dead requests must not fill the queue.
        return False

    def pause_writing(self) -> None:
        if self._drained is None:
            self._drained = self.wire.loop.create_future()

    def resume_writing(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None

    # What the parser says.

    def on_message_begin(self) -> None:
        if self.phase != Phase.LINGER:
            self._reading = Request(self, monotonic())
            self._raw_bytes = 0
            self._enter(Phase.HEAD)

    def on_url(self, url: bytes) -> None:
        if self._reading is not None:
            self._reading.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        request = self._reading
        if request is None or request.method:  # a trailer
            return
        self._raw_bytes += len(name) + len(value)
        headers = request.headers
        name = name.lower()
        headers[name] = headers[name] + b", " + value if name in headers else value

    def on_headers_complete(self) -> None:
        request = self._reading
        if request is None:
            return
        request.method = self._parser.get_method()
        request.path, _, request.query = request.url.partition(b"?")
        request.http10 = self._parser.get_http_version() == "1.0"
        request.keep_alive = self._parser.should_keep_alive() and not self.wire.is_draining
        if self._raw_bytes + len(request.url) > MOST_HEAD_BYTES or len(request.headers) > MOST_HEADERS:
            return self._refuse(431, "the request's line and headers are too large")
        if not request.http10 and b"host" not in request.headers:
            return self._refuse(400, "an HTTP/1.1 request needs a Host header")
        self._enter(Phase.BODY)
        self._raw_bytes = 0
        length = request.headers.get(b"content-length")
        if length is not None and int(length) > self.wire.limits.body:
            return self._too_large()
        request.is_chunked = b"transfer-encoding" in request.headers
        request.refusal = self.wire.application.admit(request)
        expects = request.headers.get(b"expect")
        if expects is not None and not request.http10:
            self._on_expect(request, expects)

    def on_body(self, body: bytes) -> None:
        request = self._reading
        if request is None:
            return
        self._body_bytes += len(body)
        if self._body_bytes > self.wire.limits.body:
            self._too_large()
        elif request.refusal is not None:
            pass  # read, so that the connection can go on, and not kept
        elif self.wire.buffered + len(body) > self.wire.limits.buffered:
            self._refuse(503, "too many large requests at once; try again", b"retry-after: 1\r\n")
        else:
            self._chunks.append(body)
            self._kept_bytes += len(body)
            self.wire.buffered += len(body)

    def on_message_complete(self) -> None:
        request = self._reading
        if request is None:
            return
        self._reading = None
        chunks = self._chunks
        request.body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        if chunks:
            self._chunks = []
        self._body_bytes = self._kept_bytes = 0
        self._waiting.append(request)
        self._pump()

    # What the application says.

    def send(self, data: bytes) -> None:
        """Write; nothing happens when the client has gone."""
        if not self.is_lost:
            self._transport.write(data)

    async def writable(self) -> None:
        """Wait until the client has read enough of what was sent."""
        if self._drained is not None:
            await self._drained

    def finish(self, request: Request) -> None:
        """The answer to this request, the active one, is whole."""
        assert request is self._active, "answered twice, or out of turn"
        self._release(len(request.body))
        self._active = None
        if self.is_lost:
            return
        if not request.keep_alive:
            return self._linger()
        if not self._is_pumping:
            self._pump()
            self._go_on()

    def abort(self) -> None:
        """Close at once, whatever is still to be sent."""
        self._transport.abort()

    def time_out(self) -> None:
        """The phase has lasted too long."""
        unread = self._transport.get_write_buffer_size() > 0
        if self.phase == Phase.HEAD:
            self._refuse(408, "the request's headers took too long")
        elif self.phase == Phase.BODY:
            self._refuse(408, "the request's body took too long")
        elif self.phase == Phase.IDLE and not unread:
            self._transport.close()
        elif not unread or monotonic() - self.since > self.wire.limits.write_seconds:
            self._transport.abort()

    def turn_away(self, response: Response) -> None:
        """Answer without having read anything, and close."""
        request = self._reading = Request(self, self.since)
        request.refusal = response
        self._answer_now(request)

    def close_when_idle(self) -> None:
        """No more requests after those that have begun."""
        if self.phase == Phase.IDLE:
            self._transport.close()
        for request in [self._reading, self._active, *self._waiting]:
            if request is not None:
                request.keep_alive = False

    @property
    def is_busy(self) -> bool:
        """A request has begun, or an answer is still to be sent."""
        if self.phase in (Phase.IDLE, Phase.LINGER):
            return self._transport.get_write_buffer_size() > 0
        return True

    def is_stuck(self, seconds: float, now: float) -> bool:
        """The client has not read what was sent for that long."""
        return self._drained is not None and now - self.since > seconds

    # Between them.

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # Not offered. The request itself has been taken; what follows it is in no protocol that is spoken here.
            self._end_after_this()
        except httptools.HttpParserError as error:
            if self.phase != Phase.LINGER:
                self._refuse(400, f"malformed HTTP request ({error})")
        else:
            self._raw_bytes += len(data)
            if self.phase == Phase.HEAD and self._raw_bytes > MOST_HEAD_BYTES:
                self._refuse(431, "the request's line and headers are too large")
            elif self.phase == Phase.BODY and self._raw_bytes > 8 * self.wire.limits.body + MOST_HEAD_BYTES:
                self._too_large()  # chunks of a byte each, or endless trailers

    def _pump(self) -> None:
        """Hand over requests that are whole, one after the other."""
        self._is_pumping = True
        while self._active is None and self._waiting and self.phase != Phase.LINGER:
            request = self._active = self._waiting.popleft()
            self._enter(Phase.ANSWER)
            if request.refusal is not None:
                request.respond(request.refusal)
            else:
                self.wire.application.handle(request)
        self._is_pumping = False
        if self._active is None and self.phase == Phase.ANSWER:
            self._enter(self._reading_phase())

    def _go_on(self) -> None:
        """Read again what was held back while an answer was under way."""
        while self._held and self._active is None and self.phase != Phase.LINGER:
            data, self._held = self._held, b""
            self._feed(data)
        if self._active is None and not self.is_lost:
            self._transport.resume_reading()

    def _reading_phase(self) -> Phase:
        if self._reading is None:
            return Phase.IDLE
        return Phase.BODY if self._reading.method else Phase.HEAD

    def _enter(self, phase: Phase) -> None:
        # While an answer is under way, the time is the application's.
        if self._active is None or phase >= Phase.ANSWER:
            self.phase = phase
            self.since = monotonic()

    def _on_expect(self, request: Request, expects: bytes) -> None:
        if expects.lower() != b"100-continue":
            self._refuse(417, "the only expectation known here is 100-continue")
        elif request.refusal is not None:
            self._answer_now(request)
        elif self._active is None and not self._waiting:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _too_large(self) -> None:
        most = f"{self.wire.limits.body / (1 << 20):.3g} MiB"
        self._refuse(413, f"the body is larger than {most}, the most that is taken here")

    def _refuse(self, status: int, message: str, headers: bytes = b"") -> None:
        """Answer what is being read, and end the connection: the rest of the request is not looked at."""
        request = self._reading or Request(self, monotonic())
        request.refusal = self.wire.application.refuse(request, status, message, headers)
        self._answer_now(request)

    def _answer_now(self, request: Request) -> None:
        self._reading = None
        self._release(self._kept_bytes)
        self._chunks, self._body_bytes, self._kept_bytes = [], 0, 0
        request.keep_alive = False
        self._waiting.append(request)
        if not self._is_pumping:
            self._pump()

    def _end_after_this(self) -> None:
        last = self._waiting[-1] if self._waiting else self._active
        if last is None:
            self._linger()
        else:
            last.keep_alive = False

    def _linger(self) -> None:
        # Closing while the client still sends would reset the connection, and the answer might never be read.
        self.phase, self.since = Phase.LINGER, monotonic()
        self._held = b""
        self._waiting.clear()
        if self._transport.is_closing():
            return
        if self._transport.can_write_eof():
            self._transport.write_eof()
            self._transport.resume_reading()
        else:
            self._transport.close()

    def _release(self, count: int) -> None:
        self.wire.buffered -= count

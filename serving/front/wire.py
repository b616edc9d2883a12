"""What all connections share: their limits, their clock, and the application behind them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from email.utils import formatdate
from time import monotonic
from typing import Protocol

from serving.front.connection import Connection, Phase
from serving.front.http import Request, Response

SWEEP_SECONDS = 0.5
EVICTABLE_SECONDS = 0.5
"""How long a connection must have been silent before it may have to give its place to a new one."""


@dataclass(frozen=True)
class Limits:
    """What one client may ask of the server. Bytes and seconds."""

    body: int
    """Largest body of a request."""
    buffered: int
    """All bodies that are held at one time."""
    connections: int
    head_seconds: float = 10.0
    """From a request's first byte to the end of its headers."""
    body_seconds: float = 30.0
    idle_seconds: float = 75.0
    """Between two requests."""
    write_seconds: float = 30.0
    """For which a client may leave an answer unread."""
    linger_seconds: float = 2.0
    """For which a client may go on sending after its last answer."""


class Application(Protocol):
    """What answers requests."""

    def admit(self, request: Request) -> Response | None:
        """Called with the headers, before the body: None lets the request in, an answer refuses it."""
        ...

    def handle(self, request: Request) -> None:
        """Called with the whole request; must answer it, now or later."""
        ...

    def refuse(self, request: Request, status: int, message: str, headers: bytes) -> Response:
        """The answer to what is malformed, too large or too slow."""
        ...


class Wire:
    """All connections of the server."""

    def __init__(self, application: Application, limits: Limits, loop: asyncio.AbstractEventLoop) -> None:
        self.application, self.limits, self.loop = application, limits, loop
        self.connections: set[Connection] = set()
        self.buffered = 0
        """Bytes of bodies that are held now."""
        self.is_draining = False
        self.date = b""
        """The Date header's line."""
        self._timer: asyncio.TimerHandle | None = None
        self._sweep()

    def accept(self, connection: Connection) -> None:
        """A new connection takes its place, if need be that of the one that has been silent for longest."""
        if len(self.connections) >= 2 * self.limits.connections:  # those that still have to read their 408
            return connection.abort()
        if len(self.connections) >= self.limits.connections:
            now = monotonic()
            silent = [c for c in self.connections if c.phase < Phase.ANSWER and now - c.since > EVICTABLE_SECONDS]
            if not silent:
                self.connections.add(connection)
                headers = b"retry-after: 1\r\n"
                refusal = self.application.refuse(Request(connection, now), 503, "too many connections", headers)
                return connection.turn_away(refusal)
            min(silent, key=lambda c: c.since).time_out()
        self.connections.add(connection)

    def drain(self) -> None:
        """Close connections as soon as their last request is answered."""
        self.is_draining = True
        for connection in list(self.connections):
            connection.close_when_idle()

    def unanswered(self) -> int:
        """Connections with a request that has begun and has no whole answer yet."""
        return sum(connection.is_busy for connection in self.connections)

    def close(self) -> None:
        """End what is left."""
        if self._timer is not None:
            self._timer.cancel()
        for connection in list(self.connections):
            connection.abort()

    def _sweep(self) -> None:
        now, limits = monotonic(), self.limits
        self.date = b"date: %b\r\n" % formatdate(usegmt=True).encode()
        allowed = {
            Phase.IDLE: limits.idle_seconds,
            Phase.HEAD: limits.head_seconds,
            Phase.BODY: limits.body_seconds,
            Phase.LINGER: limits.linger_seconds,
        }
        for connection in list(self.connections):
            seconds = allowed.get(connection.phase)
            if seconds is None:
                if connection.is_stuck(limits.write_seconds, now):
                    connection.abort()
            elif now - connection.since > seconds:
                connection.time_out()
        self._timer = self.loop.call_later(SWEEP_SECONDS, self._sweep)

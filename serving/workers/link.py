"""The front's end of a worker's connection, on the event loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import cast

import msgspec

from serving.workers.messages import Message, decode
from serving.workers.wire import Reader


class Link(asyncio.BufferedProtocol):
    """Bytes go straight into a message's own memory, and each message to `hear` as soon as it is whole."""

    def __init__(self, hear: Callable[[Message, memoryview], None], lose: Callable[[], None]) -> None:
        self._hear, self._lose = hear, lose
        self._reader = Reader()
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def over(
        cls, end: socket.socket, hear: Callable[[Message, memoryview], None], lose: Callable[[], None]
    ) -> Link:
        """Takes the socket over. `lose` is called once, when the connection is gone for whatever reason."""
        loop = asyncio.get_running_loop()
        _, link = await loop.create_unix_connection(lambda: cls(hear, lose), sock=end)
        return link

    def send(self, message: bytes) -> None:
        """Never blocks; what the worker does not read yet waits here."""
        if self._transport is not None:
            self._transport.write(message)

    def close(self) -> None:
        """Give the connection up, with what was not sent."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has the methods, not the class

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._reader.space()

    def buffer_updated(self, nbytes: int) -> None:
        try:
            for header, body in self._reader.received(nbytes):
                self._hear(decode(header), body)
        except msgspec.DecodeError:  # memory of the worker's is damaged: no message of it can be trusted
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._lose()

"""Messages between the processes of a search: one JSON object a line over a socket. No torch, no Ray."""

from __future__ import annotations

import json
import socket
from typing import Any

Message = dict[str, Any]
CHUNK = 1 << 16


class Channel:
    """One end of a pair of connected sockets."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._buffer = bytearray()
        self.is_open = True
        """Whether the other side may still send."""

    def send(self, message: Message) -> None:
        """Send a message. Raises OSError where the other side is gone."""
        self._end.sendall(json.dumps(message).encode() + b"\n")

    def recv(self) -> Message | None:
        """Wait for the next message; None when the other side is gone."""
        while (message := self._next()) is None:
            if not self._fill():
                return None
        return message

    def arrived(self, wait: bool = True) -> list[Message]:
        """All whole messages of what is there; waits for something where there is nothing, unless `wait` is False."""
        self._end.setblocking(wait)
        try:
            self._fill()
        except BlockingIOError:
            pass
        finally:
            self._end.setblocking(True)
        messages = []
        while (message := self._next()) is not None:
            messages.append(message)
        return messages

    def fileno(self) -> int:
        """For `select`."""
        return self._end.fileno()

    def close(self) -> None:
        """Let the other side see the end."""
        self.is_open = False
        self._end.close()

    def _fill(self) -> bool:
        try:
            data = self._end.recv(CHUNK)
        except ConnectionError:
            data = b""
        self._buffer += data
        self.is_open = bool(data)
        return self.is_open

    def _next(self) -> Message | None:
        line, newline, rest = self._buffer.partition(b"\n")
        if not newline:
            return None
        self._buffer = rest
        message: Message = json.loads(line)
        return message


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets of this machine, which programs that are started don't inherit."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)

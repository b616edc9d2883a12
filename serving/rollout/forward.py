"""One request sent on to one version, and its answer, with what may be said of both."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from multidict import CIMultiDict

if TYPE_CHECKING:
    import aiohttp
    from aiohttp import web

    from serving.rollout.versions import Version

HELD = 1 << 20
"""Bytes of a body that are held: a request that small can be sent twice, an answer that small is read first."""
HOP_BY_HOP = frozenset(
    (
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer"),
        *("transfer-encoding", "upgrade", "host", "content-length", "expect"),
    )
)
"""Headers that are of one connection, or that the client library writes itself."""
CONNECT_SECONDS = 2.0
ANSWER_SECONDS = 300.0
"""Until an answer begins, where the client names no deadline."""
BODY_SECONDS = 30.0
"""For a small body, or for the next piece of a large one."""
GRACE = 0.25
"""Seconds that a version may be late, which knows the deadline itself and answers 504."""


class Body:
    """A request's body: held where it is small, else passed on as it comes."""

    def __init__(self, request: web.BaseRequest, limit: int) -> None:
        self._request, self._limit = request, limit
        self._held: bytes | None = None
        self.begun = False
        """Whether bytes of it were passed on that are not held."""
        self.too_large = False
        self.broken = False
        """The client ended within it."""

    async def open(self) -> None:
        """Read a small body whole. Raises TooLarge, and TimeoutError for a client that is too slow."""
        length = self._request.content_length
        if length is not None and length > self._limit:
            raise TooLarge
        if not self._request.can_read_body:
            self._held = b""
        elif length is not None and length <= HELD:
            async with asyncio.timeout(BODY_SECONDS):
                self._held = await self._request.content.read(-1) if length else b""

    @property
    def repeatable(self) -> bool:
        """Whether it can be sent again."""
        return self._held is not None or not self.begun

    @property
    def held(self) -> bytes | None:
        """The whole body, where it is held."""
        return self._held

    def content(self) -> bytes | AsyncIterator[bytes]:
        """What the client library sends."""
        return self._held if self._held is not None else self._stream()

    async def _stream(self) -> AsyncIterator[bytes]:
        passed, content = 0, self._request.content
        while True:
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    chunk = await content.readany()
            except BaseException:
                self.broken = True
                raise
            if not chunk:
                return
            self.begun = True
            passed += len(chunk)
            if passed > self._limit:
                self.too_large = True
                raise TooLarge
            yield chunk


class TooLarge(Exception):
    """A body beyond the limit."""


@dataclass(slots=True)
class Answer:
    """What a version answered, or why it did not."""

    status: int
    """0 where no answer came."""
    seconds: float
    headers: CIMultiDict[str] = field(default_factory=CIMultiDict)
    body: bytes | None = None
    """Whole, where it is small; else it is still to be read from `response`."""
    response: aiohttp.ClientResponse | None = None
    unsent: bool = False
    """No byte of the request reached the version."""
    why: str = ""

    @property
    def failed(self) -> bool:
        return self.status == 0 or self.status >= 500


async def send(
    session: aiohttp.ClientSession,
    version: Version,
    request: web.BaseRequest,
    headers: CIMultiDict[str],
    content: bytes | AsyncIterator[bytes] | None,
    deadline: float | None,
) -> Answer:
    """Send a request on. Raises nothing but cancellation; `deadline` is a time of `time.monotonic`."""
    import aiohttp

    began = time.monotonic()
    patience = ANSWER_SECONDS if deadline is None else max(deadline - began, 0.0) + GRACE
    try:
        async with asyncio.timeout(patience):
            response = await session.request(
                request.method,
                f"{version.url}{request.raw_path}",
                data=content or None,
                headers=headers,
                allow_redirects=False,
                skip_auto_headers=("User-Agent", "Content-Type", "Accept", "Accept-Encoding"),
            )
            answer = Answer(response.status, 0.0, end_to_end(response.headers), response=response)
            length = response.content_length
            if (length is not None and length <= HELD) or request.method == "HEAD":
                answer.body = await response.read()
                answer.response = None
            answer.seconds = time.monotonic() - began
            return answer
    except TimeoutError:
        return Answer(0, time.monotonic() - began, why="no answer in time")
    except aiohttp.ClientConnectorError as error:
        return Answer(0, time.monotonic() - began, unsent=True, why=str(error.os_error))
    except (aiohttp.ClientError, ConnectionError, TooLarge) as error:
        return Answer(0, time.monotonic() - began, why=str(error) or type(error).__name__)


def end_to_end(headers: aiohttp.typedefs.LooseHeaders) -> CIMultiDict[str]:
    """Headers without those that belong to one connection, and those that `Connection` names."""
    given: CIMultiDict[str] = CIMultiDict(headers)
    named = {name.strip().lower() for value in given.getall("Connection", []) for name in value.split(",")}
    dropped = HOP_BY_HOP | named
    return CIMultiDict((name, value) for name, value in given.items() if name.lower() not in dropped)

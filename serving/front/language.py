"""Language models: `serving.language` answers, whole or as a stream; the front counts and logs it like the rest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING
from urllib.parse import unquote

from serving.front.http import JSON, Request, Response

if TYPE_CHECKING:
    from serving.front.app import App


def method(path: str) -> bytes:
    """How the path is asked, where it is one of OpenAI's that are answered here; else empty."""
    from serving.language import routes

    return routes.method(path).encode()


async def answer(app: App, request: Request) -> None:
    """Answer a request for a language model."""
    from serving.front.app import Outcome, asked_seconds
    from serving.language import routes

    asked = routes.Asked(unquote(request.path.decode("ascii")), request.body, asked_seconds(request))
    status, outcome = 499, Outcome()
    try:
        reply = await routes.answer(asked, app.served.language)
        if reply.model:
            outcome.metrics = app.metrics.of(reply.model, reply.version)
        content_type, lines = _headers(reply.headers)
        if isinstance(reply.body, bytes):
            request.respond(Response(reply.status, reply.body, content_type, lines))
        else:
            request.start_stream(reply.status, content_type, lines)
            await _stream(request, reply.body)
        status = reply.status
    except asyncio.CancelledError:
        raise
    except ConnectionResetError:
        status = 499  # hung up in the middle of a stream
    except Exception as error:
        app.report(request, error)
        status, outcome.error = 500, type(error).__name__
        if request.streams:
            request.break_off()
        else:
            request.respond(app.internal_error(request))
    finally:
        app.tell(request, status, outcome)


async def _stream(request: Request, parts: AsyncIterator[bytes]) -> None:
    try:
        async for part in parts:
            await request.stream(part)
        request.end_stream()
    finally:
        close = getattr(parts, "aclose", None)
        if close is not None:
            await close()


def _headers(headers: Mapping[str, str]) -> tuple[bytes, bytes]:
    """(the content type, the other headers' lines)."""
    content_type, lines = JSON, []
    for name, value in headers.items():
        if name.lower() == "content-type":
            content_type = value.encode("latin-1")
        elif name.lower() not in ("content-length", "transfer-encoding", "connection", "date"):
            lines.append(f"{name.lower()}: {value}\r\n".encode("latin-1"))
    return content_type, b"".join(lines)

"""The endpoints as an ASGI application, for a server that speaks it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from serving.language.routes import Asked, Models, Reply, answer, takes

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


async def handle(scope: Scope, receive: Receive, send: Send, models: Models) -> bool:
    """Answer a request for one of the endpoints; False, with nothing done, for any other."""
    if scope["type"] != "http" or not takes(scope["path"]):
        return False
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return True
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            break
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    asked = Asked(scope["method"], scope["path"], headers, b"".join(parts))
    work = asyncio.create_task(_respond(asked, send, models))
    gone = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not work.done():
            work.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)
    return True


async def _respond(asked: Asked, send: Send, models: Models) -> None:
    reply = await answer(asked, models)
    await send({"type": "http.response.start", "status": reply.status, "headers": _headers(reply)})
    if isinstance(reply.body, bytes):
        await send({"type": "http.response.body", "body": reply.body})
        return
    try:
        async for part in reply.body:
            await send({"type": "http.response.body", "body": part, "more_body": True})
    finally:
        await reply.body.aclose()  # type: ignore[attr-defined]  # it is a generator
    await send({"type": "http.response.body", "body": b""})


def _headers(reply: Reply) -> list[tuple[bytes, bytes]]:
    found = [(name.encode(), value.encode()) for name, value in reply.headers.items()]
    if isinstance(reply.body, bytes):
        found.append((b"content-length", str(len(reply.body)).encode()))
    return found


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

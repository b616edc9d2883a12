"""The admin surface: HTTP on a unix socket in the state directory, for whoever may write there."""

from __future__ import annotations

import http.client
import json
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.errors import Mistake, ServingError
from serving.rollout import plan as plans
from serving.rollout.controller import Controller

if TYPE_CHECKING:
    from aiohttp import web

SECONDS = 60.0
LONGEST_SOCKET = 100
"""Bytes of a unix socket's path; the kernel takes 107."""


def application(controller: Controller) -> web.Application:
    """`GET /status`, `POST /start`, `/promote`, `/rollback`, `/labels`."""
    from aiohttp import web

    async def status(_: web.Request) -> web.Response:
        return web.json_response(controller.status())

    async def start(request: web.Request) -> web.Response:
        content = await _object(request)
        plan = plans.build_plan(content.get("plan") or {})
        return web.json_response({"rollout": await controller.start(str(content["source"]), plan)})

    async def promote(_: web.Request) -> web.Response:
        await controller.promote()
        return web.json_response(controller.status())

    async def rollback(_: web.Request) -> web.Response:
        return web.json_response({"back_to": await controller.rollback()})

    async def labels(request: web.Request) -> web.Response:
        content = json.loads(await request.read() or b"null")
        entries = content if isinstance(content, list) else [content]
        return web.json_response(controller.learn([_label(entry) for entry in entries]))

    app = web.Application(middlewares=[_errors()], client_max_size=64 << 20)
    app.add_routes([web.get("/status", status), web.post("/start", start), web.post("/promote", promote)])
    app.add_routes([web.post("/rollback", rollback), web.post("/labels", labels)])
    return app


def ask(path: Path, method: str, target: str, content: Any = None) -> Any:
    """Ask the front that runs on a state directory's socket. Raises Mistake where none runs, or for what it refuses."""
    connection = http.client.HTTPConnection("localhost", timeout=SECONDS)
    try:
        connection.sock = _connected(path)
        body = None if content is None else json.dumps(content)
        connection.request(method, target, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        said = json.loads(answer.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ServingError(f"{path}: the front does not answer ({error or type(error).__name__})") from error
    finally:
        connection.close()
    if answer.status >= 400:
        kind = Mistake if answer.status < 500 else ServingError
        raise kind(said["error"])
    return said


def bound(path: Path) -> socket.socket:
    """A listening socket that only its owner may use. Raises Mistake where the path is too long for the kernel."""
    if len(os.fsencode(path)) > LONGEST_SOCKET:
        raise Mistake(f"{path}: too long for a socket ({LONGEST_SOCKET} bytes); use a shorter --folder")
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        made.bind(str(path))
    finally:
        os.umask(mask)
    made.setblocking(False)
    return made


def _connected(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.settimeout(SECONDS)
    try:
        made.connect(str(path))
    except OSError as error:
        made.close()
        name = path.parent.name
        raise Mistake(f"no front runs for {path.parent}; start it with: trainer deploy run {name}") from error
    return made


def _errors() -> Any:
    from aiohttp import web

    @web.middleware
    async def answer(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            result: web.StreamResponse = await handler(request)
            return result
        except ServingError as error:
            return web.json_response({"error": str(error)}, status=400 if isinstance(error, Mistake) else 500)
        except (ValueError, KeyError, TypeError) as error:
            return web.json_response({"error": f"malformed request: {error}"}, status=400)

    return answer


async def _object(request: web.Request) -> dict[str, Any]:
    content = json.loads(await request.read())
    if not isinstance(content, dict):
        raise Mistake("wanted a JSON object")
    return content


def _label(entry: Any) -> tuple[str, str]:
    if not isinstance(entry, dict) or not isinstance(entry.get("request_id"), str) or entry.get("label") is None:
        raise Mistake('wanted {"request_id": "...", "label": "..."}, or a list of them')
    return entry["request_id"], str(entry["label"])

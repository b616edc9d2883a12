"""The server's life: socket, models, signals, the end."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import resource
import signal
import socket
import ssl
import sys
import time
from pathlib import Path
from typing import Any

import uvloop

from serving import options
from serving.bundle import Bundle
from serving.errors import Mistake, ServingError
from serving.front import hello
from serving.front.access import Access
from serving.front.app import App, Rules
from serving.front.connection import Connection
from serving.front.metrics import Gauges, Metrics
from serving.front.pages import Pages
from serving.front.request_log import RequestLog
from serving.front.served import Served
from serving.front.starting import Starter
from serving.front.watching import watch
from serving.front.wire import Limits, Wire

BACKLOG = 2048
ACCEPT_AFTER_TERM_SECONDS = 0.25
"""New connections are still answered that long: whoever sends them does not know yet."""
BUFFERED_BODIES = 16
"""All bodies that are held at one time, in the largest that one may be."""


def serve(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code; raises ServingError when it can't begin."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(Server(args).run())


class Server:
    """All that is alive while the server is."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._began = time.monotonic()

    async def run(self) -> int:
        """From the socket to the last answer."""
        args, loop = self._args, asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._forced = asyncio.Event()
        places = _named(options.places(args.bundles))
        tls = _tls(args)
        listening = _bind(args.host, args.port)
        _allow_files(args.max_connections)
        log = RequestLog(args.request_log, loop) if args.request_log else None
        metrics = Metrics()
        served = Served(metrics)
        metrics.registry.register(Gauges(served.models, lambda: log.lost if log else 0))
        access = Access(args.api_keys, args.admin_keys, args.rate_limit)
        rules = Rules(args.deadline_ms / 1e3, args.queue, args.request_log_hash)
        self._app = app = App(served, access, metrics, log, rules)
        app.routes = Pages(app).routes()
        app.routes.alias(options.aliases(args.alias), [name for name, _ in places])
        body = int(args.max_body_mb * options.MIB)
        self._wire = wire = Wire(app, Limits(body, BUFFERED_BODIES * body, args.max_connections), loop)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop)
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        handshake = None if tls is None else wire.limits.head_seconds
        listener = await loop.create_server(
            lambda: Connection(wire), sock=listening, backlog=BACKLOG, ssl=tls, ssl_handshake_timeout=handshake
        )
        starter = Starter(args, metrics)
        try:
            if not await self._start(starter, places):
                return 0
            address = hello.address(args, listening.getsockname()[1])
            hello.say(args, served, address, time.monotonic() - self._began)
            async with contextlib.AsyncExitStack() as stack:
                if args.watch:
                    watching = asyncio.create_task(watch(served, self._reload))
                    stack.callback(watching.cancel)
                await self._stop.wait()
            return await self._drain(listener, served)
        finally:
            listener.close()
            wire.close()
            await starter.close()
            if log is not None:
                await log.close()

    async def _start(self, starter: Starter, places: list[tuple[str, Path]]) -> bool:
        """Bring all models up; False when the server is to stop meanwhile."""
        starting = asyncio.create_task(starter.start(places, self._app.served))
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                return False
            await starting
        finally:
            for task in (starting, stopping):
                task.cancel()
            await asyncio.gather(starting, stopping, return_exceptions=True)
        self._app.routes.rebuild()
        self._app.waits_for = ""
        return True

    async def _drain(self, listener: asyncio.AbstractServer, served: Served) -> int:
        """Answer what was accepted. Returns the exit code."""
        end = time.monotonic() + self._args.drain_seconds
        self._app.is_draining = self._wire.is_draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._forced.wait(), min(ACCEPT_AFTER_TERM_SECONDS, self._args.drain_seconds))
        listener.close()
        self._wire.drain()
        while (left := self._wire.unanswered()) and time.monotonic() < end and not self._forced.is_set():
            await asyncio.sleep(0.02)
        rest = 0.0 if self._forced.is_set() else max(0.0, end - time.monotonic())
        await asyncio.gather(*(model.close(rest) for model in served))
        if left:
            print(f"serving: ended with {left} requests that had no answer", file=sys.stderr, flush=True)
        return 1 if left else 0

    def _on_stop(self) -> None:
        if self._stop.is_set():
            self._forced.set()  # told twice: at once
        self._stop.set()

    def _on_hangup(self) -> None:
        task = asyncio.create_task(self._on_hangup_async())
        task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _on_hangup_async(self) -> None:
        """A new file for the log, the keys read again, all bundles reloaded."""
        for what in (self._app.access.reload, *([self._app.log.reopen] if self._app.log else [])):
            try:
                what()
            except Mistake as error:
                print(f"serving: {error}; what was read before stays in force", file=sys.stderr, flush=True)
        for model in list(self._app.served):
            await self._reload(model)

    async def _reload(self, model: Any) -> None:
        """Reload, and say what came of it."""
        before = model.bundle.version
        try:
            bundle: Bundle = await self._app.reload(model)
            print(f"serving: {model.name}: reloaded, {before} -> {bundle.version}", file=sys.stderr, flush=True)
        except ServingError as error:
            print(f"serving: {model.name}: not reloaded, {before} goes on: {error}", file=sys.stderr, flush=True)


def _named(places: list[options.Place]) -> list[tuple[str, Path]]:
    """(name, folder), the manifests read. Raises Mistake."""
    found: dict[str, Path] = {}
    for place in places:
        bundle = Bundle.read(place.path)
        name = place.name or bundle.name
        if name in found:
            raise Mistake(f"{place.path}: a model {name!r} is served already: give it another name, NAME={place.path}")
        found[name] = place.path
    return list(found.items())


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
        return listening
    except OSError as error:
        hint = "; another --port, or 0 for a free one" if error.errno == errno.EADDRINUSE else ""
        raise Mistake(f"{host}:{port} can't be listened on: {error.strerror or error}{hint}") from error


def _tls(args: argparse.Namespace) -> ssl.SSLContext | None:
    if args.tls_cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(args.tls_cert, args.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise Mistake(f"--tls-cert {args.tls_cert}, --tls-key {args.tls_key}: can't be used ({error})") from error
    return context


def _allow_files(connections: int) -> None:
    """As many open files as the connections need, where the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * connections + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))

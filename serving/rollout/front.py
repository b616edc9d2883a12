"""The front's process: listens, forwards, conducts, and goes on from its state directory when it is started again."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import ssl
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import uvloop

from serving.errors import Mistake, ServingError
from serving.rollout import admin
from serving.rollout.controller import START_SECONDS, Controller
from serving.rollout.metrics import Metrics
from serving.rollout.proxy import Proxy
from serving.rollout.routing import Routing
from serving.rollout.shadow import Shadow
from serving.rollout.state import LOGS, StateDirectory
from serving.rollout.strict import build
from serving.rollout.versions import Version

if TYPE_CHECKING:
    import aiohttp

IDLE_SECONDS = 2.0
"""A connection to a version that stood idle for longer is not used again: servers close theirs after 5 s or more."""
HOPELESS = 3
"""Ends of the first version's process before it was ever ready, after which the front gives up."""


@dataclass(frozen=True)
class Settings:
    """How a front was started; kept with its state."""

    source: str
    """The version to begin with: a bundle's folder or a URL."""
    host: str = "127.0.0.1"
    port: int = 8000
    tls_cert: str = ""
    tls_key: str = ""
    max_body_mb: int = 16
    drain_seconds: float = 30.0
    hook: tuple[str, ...] = ()
    """Command that is told of promotions and rollbacks, see `hook`."""
    server: tuple[str, ...] = ()
    """Program that serves a bundle; this Python's `-m serving` where there is none."""
    options: tuple[str, ...] = ()
    """More options of that program."""


def run(directory: StateDirectory, given: Settings | None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code. `given` is None to go on as before. Raises ServingError."""
    with directory.locked():
        directory.clear_leftovers()
        state = directory.read()
        if state is None and given is None:
            raise Mistake(f"{directory.path}: nothing runs here yet; name the bundle or the URL to begin with")
        settings = given if given is not None else build(Settings, (state or {})["settings"], "state.json: settings")
        if state is not None and given is not None and given.source != state["source"]:
            raise Mistake(
                f"{directory.path} serves {state['source']}; give it a new version with: trainer deploy start "
                f"{directory.path.name} {given.source}"
            )
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_Front(directory, settings, state or {}).serve())


class _Front:
    def __init__(self, directory: StateDirectory, settings: Settings, state: dict[str, Any]) -> None:
        self._directory, self._settings, self._state = directory, settings, state
        self._metrics = Metrics()
        self._stop = asyncio.Event()

    async def serve(self) -> int:
        import aiohttp

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS)
        async with aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=2.0),
        ) as session:
            return await self._serve(session)

    async def _serve(self, session: aiohttp.ClientSession) -> int:
        from aiohttp import web

        old = self._version(self._state.get("source", self._settings.source), session)
        routing = Routing(old)
        controller = self._controller(routing, session)
        shadow = Shadow(routing, session, self._metrics, controller.seen_pair, controller.count_pair)
        proxy = Proxy(routing, session, self._metrics, controller.seen, shadow.copy, self._settings.max_body_mb << 20)
        old.start(self._say)
        await controller.resume(self._state)
        server = web.Server(proxy.handle, handler_cancellation=True, keepalive_timeout=75.0, access_log=None)
        runner = web.ServerRunner(server, shutdown_timeout=self._settings.drain_seconds)
        admin_runner = web.AppRunner(admin.application(controller), access_log=None)
        await runner.setup()
        await admin_runner.setup()
        tasks = [asyncio.create_task(controller.run()), asyncio.create_task(self._stop.wait())]
        try:
            await self._listen(runner, admin_runner)
            await self._until_ready(old)
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():  # it ends only by an error
                tasks[0].result()
        finally:
            proxy.draining = True
            await self._drain(runner, proxy)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await shadow.close()
            await controller.close()
            await admin_runner.cleanup()
            self._directory.socket.unlink(missing_ok=True)
        self._say("stopped; go on with: trainer deploy run " + self._directory.path.name)
        return 0

    def _version(self, source: str, session: aiohttp.ClientSession) -> Version:
        settings = self._settings
        server = settings.server or (sys.executable, "-m", "serving")
        return Version(source, server, settings.options, self._directory.path / LOGS, session)

    def _controller(self, routing: Routing, session: aiohttp.ClientSession) -> Controller:
        settings = asdict(self._settings)
        settings |= {name: [*settings[name]] for name in ("hook", "server", "options")}
        return Controller(
            self._directory,
            settings,
            routing,
            lambda source: self._version(source, session),
            session,
            self._metrics,
            self._say,
        )

    async def _listen(self, runner: Any, admin_runner: Any) -> None:
        from aiohttp import web

        settings = self._settings
        context = None
        if settings.tls_cert:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            try:
                context.load_cert_chain(settings.tls_cert, settings.tls_key or None)
            except OSError as error:
                raise Mistake(f"{settings.tls_cert}: no certificate and key that can be used: {error}") from error
        try:
            await web.TCPSite(
                runner, settings.host, settings.port, ssl_context=context, backlog=1024, reuse_address=True
            ).start()
        except OSError as error:
            raise Mistake(f"{settings.host}:{settings.port} can't be listened on: {error.strerror}") from error
        await web.SockSite(admin_runner, admin.bound(self._directory.socket)).start()
        kind = "https" if context is not None else "http"
        self._say(f"listens on {kind}://{settings.host}:{settings.port}, admin on {self._directory.socket}")

    async def _until_ready(self, old: Version) -> None:
        """Wait for the first version. Raises ServingError where it can't get ready."""
        for _ in range(int(START_SECONDS)):
            if await old.wait_ready(1.0):
                self._say(f"ready: {old.name} answers")
                return
            if self._stop.is_set():
                return
            if old.crashes >= HOPELESS:
                raise ServingError(f"{old.source}: {old.reason}; see {self._directory.path / LOGS}")
        raise ServingError(f"{old.source}: not ready after {START_SECONDS:g} s ({old.reason})")

    async def _drain(self, runner: Any, proxy: Proxy) -> None:
        """Take no new connections, and let the requests under way end."""
        for site in list(runner.sites):
            await site.stop()
        deadline = asyncio.get_running_loop().time() + self._settings.drain_seconds
        while proxy.in_flight and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(runner.cleanup(), 5.0)

    def _say(self, text: str) -> None:
        print(f"rollout {self._directory.path.name}: {text}", file=sys.stderr, flush=True)

"""Whoever takes the values, a server or a database: whether it answers, and how long a call to it may take.

A fixed timeout is wrong either way: one that is short gets nothing from a server that takes 30 s for each answer, and
one that is long keeps values back when a server has come up again. So it follows the server: doubled after a call that
got no answer, three times what the last answer took otherwise.
"""

from __future__ import annotations

import http.client
import math
import os
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import ParamSpec, TypeVar
from urllib.parse import SplitResult, urlsplit

P = ParamSpec("P")
T = TypeVar("T")

TIMEOUT_VARIABLE = "MLFLOW_HTTP_REQUEST_TIMEOUT"
"""Where MLflow's client looks, anew in each call, for how many whole seconds it waits. A user's value is the least."""
FIRST_TIMEOUT, LONGEST_TIMEOUT = 10.0, 300.0
PROBE_SECONDS = 2.0
"""The first wait for a sign of life; a server that works answers within milliseconds."""
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


class Contact:
    """One address, and what the calls to it told. Calls are made by one thread; another one may look on."""

    def __init__(self, uri: str) -> None:
        self._address = urlsplit(uri)
        scheme = self._address.scheme.partition("+")[0]
        self._is_web = scheme in ("http", "https")
        self._port = _port(self._address) or DATABASE_PORTS.get(scheme)
        self.is_remote = scheme != "sqlite"
        """Whether it lies behind a network, which may swallow what is sent."""
        self._least = _least_timeout()
        self.timeout = min(PROBE_SECONDS, self._least) if self.is_remote else self._least
        """Seconds that the next call may take."""
        self.deadline = math.inf
        """Of `time.monotonic`: no call waits for much longer."""
        self.busy_since: float | None = None
        """Since when a call is under way, by `time.monotonic`."""
        self.answered_at = -math.inf
        """When it answered last, by `time.monotonic`."""
        self.is_silent = False
        """Whether the last call got no answer in time."""
        self.slowest = 0.0
        """Seconds of the slowest answer so far."""

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call it with `timeout` as its limit, and learn from how long it took."""
        allowed = self._allowed()
        os.environ[TIMEOUT_VARIABLE] = str(allowed)
        self.busy_since = begin = time.monotonic()
        is_answered = False
        try:
            result = function(*args, **kwargs)
            is_answered = True
            return result
        finally:
            self.busy_since = None
            self._learn(time.monotonic() - begin, allowed, is_answered)

    def _allowed(self) -> int:
        return math.ceil(max(min(self.timeout, self.deadline - time.monotonic()), 1))

    def _learn(self, seconds: float, allowed: int, is_answered: bool) -> None:
        self.is_silent = not is_answered and seconds >= allowed
        if is_answered:
            self.answered_at = time.monotonic()
            self.slowest = max(self.slowest, seconds)
            # Halved at most: calls differ, and a slow kind must not time out after each quick one
            self.timeout = min(max(self._least, 3 * seconds, self.timeout / 2), LONGEST_TIMEOUT)
        elif self.is_silent and allowed >= self.timeout:
            self.timeout = min(2 * self.timeout, LONGEST_TIMEOUT)

    def knock(self) -> None:
        """See whether anything answers, at the cost of a socket: mlflow takes 2 s of CPU to import.

        Whatever is answered will do, a refusal too: what it means, MLflow's client says better. Nothing is asked where
        there is no host and port (a file, `databricks`). Raises ConnectionError, in one line, when nobody answers.
        """
        if not self._address.hostname or not (self._is_web or self._port):
            return
        seconds = self._allowed()
        try:
            self.call(self._knock, seconds)
        except TimeoutError as error:
            raise ConnectionError(f"{self._shown} gives no answer within {seconds} s") from error
        except OSError as error:
            raise ConnectionError(f"{self._shown}: {error.strerror or error}") from error

    def _knock(self, seconds: float) -> None:
        assert self._address.hostname is not None
        if not self._is_web:
            socket.create_connection((self._address.hostname, self._port or 0), timeout=seconds).close()
            return
        # Proxies of the environment are used, as MLflow's client does; nothing is followed, no certificate looked at,
        # since nothing is told to whom answers.
        tls = urllib.request.HTTPSHandler(context=ssl._create_unverified_context())
        opener = urllib.request.build_opener(_NoRedirects, tls)
        try:
            opener.open(f"{self._shown.rstrip('/')}/health", timeout=seconds).close()
        except urllib.error.HTTPError:
            return
        except urllib.error.URLError as error:
            if isinstance(error.reason, OSError) and not isinstance(error.reason, ssl.SSLError):
                raise error.reason from error
        except http.client.HTTPException:
            return

    @property
    def _shown(self) -> str:
        """The address without user, password and query: fit for a log."""
        host = self._address.netloc.rpartition("@")[2]
        return f"{self._address.scheme}://{host}{self._address.path if self._is_web else ''}"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        """Where it points to has answered nothing yet."""
        return None


def _port(address: SplitResult) -> int | None:
    try:
        return address.port
    except ValueError:  # not a number: MLflow's client will say so
        return None


def _least_timeout() -> float:
    try:
        return max(float(os.environ.get(TIMEOUT_VARIABLE, FIRST_TIMEOUT)), 1)
    except ValueError:  # MLflow's client would refuse it in each call
        return FIRST_TIMEOUT

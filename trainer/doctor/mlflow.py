"""`trainer doctor`: whether MLflow can be reached at the address that a run would use. Doesn't import it."""

from __future__ import annotations

import base64
import http.client
import os
import socket
import sqlite3
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote, urlsplit

from trainer.config import Tracking
from trainer.contact import DATABASE_PORTS
from trainer.doctor import Check, Setting, ok, problem, warning
from trainer.errors import UserError
from trainer.lineage import without_password
from trainer.tracking import sqlite_path, tracking_uri

NAME = "MLflow"
SECONDS = 4.0
"""For a connection, and for each word of an answer: a server that works answers /health within milliseconds."""
BUSY_SECONDS = 2.0
"""For a database that another program is writing to."""
GOES_ON = "a training goes on without it, and `trainer runs sync RUN` sends what is missing later"


def mlflow(setting: Setting) -> list[Check]:
    """Server, database file or database server, whichever the address means."""
    tracking = setting.config.tracking if setting.config else Tracking()
    if not tracking.enabled:
        return ok(NAME, "switched off (tracking.enabled)")
    try:
        uri = tracking_uri(tracking, setting.runs_dir)
        parts = urlsplit(uri)
        port = parts.port or DATABASE_PORTS.get(parts.scheme.partition("+")[0])
    except UserError as error:
        return problem(NAME, str(error), "set tracking.uri or MLFLOW_TRACKING_URI to such an address")
    except ValueError as error:
        return problem(
            NAME, f"the address is none: {error}", "set tracking.uri or MLFLOW_TRACKING_URI to scheme://host:port"
        )
    if parts.scheme in ("http", "https"):
        return _server(parts)
    file = sqlite_path(uri)
    if file is not None:
        return _database(file)
    if parts.hostname and port:
        return _listening(parts.hostname, port, without_password(uri))
    return warning(NAME, f"{without_password(uri)} is of a kind that can't be looked at here", "try it: trainer fit")


def _server(address: SplitResult) -> list[Check]:
    host = f"[{address.hostname}]" if ":" in (address.hostname or "") else address.hostname or ""
    bare = address._replace(netloc=f"{host}:{address.port}" if address.port else host, query="", fragment="")
    shown = bare.geturl()
    request = urllib.request.Request(bare._replace(path=f"{bare.path.rstrip('/')}/health").geturl())
    for name, value in _authorization(address).items():
        request.add_unredirected_header(name, value)  # not for another host, should it send us there
    start = time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=SECONDS, context=_tls()) as answer:
            body = answer.read(100)
    except urllib.error.HTTPError as error:
        return _refused(shown, error.code)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError):
            text = f"no answer within {SECONDS:g} s"
        else:
            text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        return problem(NAME, f"{shown}: {without_password(text)}", f"start the server or mend the address; {GOES_ON}")
    if body.strip() != b"OK":
        return warning(NAME, f"{shown} answers, but not as MLflow's /health does", "is it the address of MLflow?")
    return ok(NAME, f"{shown} answers in {1000 * (time.monotonic() - start):.0f} ms")


def _refused(shown: str, code: int) -> list[Check]:
    if code in (401, 403):
        remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        return problem(NAME, f"{shown} refuses the credentials (status {code})", remedy)
    if code < 500:
        return warning(NAME, f"{shown} answers /health with status {code}", "is it the address of MLflow?")
    return problem(NAME, f"{shown} answers with status {code}", f"look at the server's log; {GOES_ON}")


def _authorization(address: SplitResult) -> dict[str, str]:
    """As MLflow sends it: of the address, or of the environment."""
    user = unquote(address.username) if address.username else os.environ.get("MLFLOW_TRACKING_USERNAME")
    password = unquote(address.password) if address.password else os.environ.get("MLFLOW_TRACKING_PASSWORD")
    if user and password:
        return {"Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _tls() -> ssl.SSLContext:
    """With the certificates that MLflow's variables name."""
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() == "true":
        return ssl._create_unverified_context()
    named = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or os.environ.get("REQUESTS_CA_BUNDLE")
    return ssl.create_default_context(cafile=named)


def _database(file: Path) -> list[Check]:
    folder = next(path for path in file.absolute().parents if path.exists())
    elsewhere = "set tracking.uri to another place"
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):  # its journal is written beside it
        return problem(NAME, f"{file}: {folder} can't be written", f"make it writable, or {elsewhere}")
    if not file.exists():
        return ok(NAME, f"{file} will be made by the first run")
    if not os.access(file, os.R_OK | os.W_OK):
        return problem(NAME, f"{file} can't be written", f"make it writable, or {elsewhere}")
    try:
        connection = sqlite3.connect(f"file:{quote(str(file.absolute()))}?mode=ro", uri=True, timeout=BUSY_SECONDS)
        try:
            (tables,) = connection.execute("SELECT count(*) FROM sqlite_master WHERE type = 'table'").fetchone()
        finally:
            connection.close()
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            return warning(NAME, f"{file} is held by another program", "end what holds it, or use an MLflow server")
        return problem(NAME, f"{file}: {error}", elsewhere)
    except sqlite3.DatabaseError as error:
        return problem(NAME, f"{file}: {error}", f"move it away, or {elsewhere}")
    return ok(NAME, f"{file}, a database of {tables} tables")


def _listening(host: str, port: int, shown: str) -> list[Check]:
    try:
        socket.create_connection((host, port), timeout=SECONDS).close()
    except OSError as error:
        reason = f"no answer within {SECONDS:g} s" if isinstance(error, TimeoutError) else error.strerror or str(error)
        return problem(NAME, f"{shown}: {reason}", f"start the database server or mend the address; {GOES_ON}")
    return ok(NAME, f"{shown} takes connections (no more was tried)")

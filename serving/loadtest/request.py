"""What is sent, and where: the URL, headers with their secrets by reference, bodies and the answers they should get."""

from __future__ import annotations

import http.client
import json
import mimetypes
import os
import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from serving.errors import Mistake

SECRET = re.compile(r"authorization|cookie|token|secret|key|password", re.IGNORECASE)
TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
MAX_EXAMPLE_BYTES = 10_000_000


@dataclass(frozen=True)
class Target:
    """The URL in parts."""

    origin: str
    """`http://host:port`."""
    path: str
    """With the query."""

    @property
    def url(self) -> str:
        return self.origin + self.path


@dataclass(frozen=True)
class Payload:
    """One body, and what must be in its answer."""

    body: bytes | None
    content_type: str | None = None
    expected: Any = None
    """None where any 2xx will do."""


@dataclass(frozen=True)
class Request:
    """What is sent again and again, the payloads in turn."""

    target: Target
    payloads: tuple[Payload, ...]
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    tolerance: float = 0.0
    """Of numbers in answers."""

    @property
    def method(self) -> str:
        return "GET" if self.payloads[0].body is None else "POST"


def parse_url(text: str, has_body: bool) -> Target:
    """Check a URL; one without a path means `/predict` where there is a body. Raises Mistake."""
    try:
        parts: SplitResult = urlsplit(text if "://" in text else f"http://{text}")
        port = parts.port
    except ValueError as error:
        raise Mistake(f"{text!r} is no URL ({error}); write e.g. http://127.0.0.1:8000/predict") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"[\x00-\x20\x7f]", text):
        raise Mistake(f"{text!r} is no http or https URL; write e.g. http://127.0.0.1:8000/predict")
    if parts.username is not None or parts.password is not None:
        raise Mistake("the URL holds a password; give it as --header 'Authorization: @FILE'")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    path = parts.path if parts.path not in ("", "/") or not has_body else "/predict"
    query = f"?{parts.query}" if parts.query else ""
    origin = f"{parts.scheme}://{host}" + (f":{port}" if port else "")
    return Target(origin, (path or "/") + query)


def parse_headers(lines: Sequence[str]) -> dict[str, str]:
    """`Name: value`; `@file` is what the file holds, `$NAME` what the environment holds.

    Raises Mistake for a line that is none, and for a secret that stands in the command line: other users of the
    machine see that in the list of processes.
    """
    found = {}
    for line in lines:
        key, colon, value = line.partition(":")
        key, value = key.strip(), value.strip()
        if not colon or not TOKEN.fullmatch(key):
            raise Mistake(f"--header {key!r}: write it as 'Name: value'")
        if value.startswith("@"):
            value = _file_text(key, Path(value[1:]))
        elif value.startswith("$"):
            if value[1:] not in os.environ:
                raise Mistake(f"--header {key}: the environment has no variable {value[1:]!r}")
            value = os.environ[value[1:]].strip()
        elif SECRET.search(key):
            raise Mistake(f"--header {key}: give a secret as '{key}: @FILE' or '{key}: $VARIABLE' (in single quotes)")
        if not value.isprintable() or not value.isascii():
            raise Mistake(f"--header {key}: its value holds characters that no header may")
        found[key] = value
    return found


def from_file(file: Path) -> Payload:
    """A file as body; its name says the content type. Raises Mistake."""
    try:
        body = file.read_bytes()
    except OSError as error:
        raise Mistake(f"--body {file}: can't be read ({error.strerror})") from error
    return Payload(body, mimetypes.guess_type(file.name)[0] or "application/octet-stream")


def from_bundle(folder: Path) -> tuple[tuple[Payload, ...], float]:
    """(the golden requests of a bundle with their answers, the tolerance). Raises ServingError."""
    from serving import outputs
    from serving.bundle import Bundle
    from serving.predictor import read_golden

    bundle = Bundle.read(folder)
    if bundle.program.runtime == "transformers":
        raise Mistake(f"{folder}: a language model's golden requests are no /predict requests; give --body FILE")
    output = outputs.load(bundle.postprocessing, bundle.signature)
    payloads = []
    for request, answer in zip(*read_golden(bundle), strict=True):
        body = json.dumps({"instances": [request]}, separators=(",", ":")).encode()
        payloads.append(Payload(body, "application/json", {"predictions": [output.render(tuple(answer))]}))
    return tuple(payloads), bundle.golden.tolerance


def example(origin: str, headers: dict[str, str], timeout: float) -> Payload:
    """The example that a server's OpenAPI document gives for `/predict`. Raises Mistake where there is none."""
    hint = "say what to send: --golden BUNDLE, --body FILE, or a URL with a path to GET"
    status, content = _exchange(Target(origin, "/openapi.json"), "GET", Payload(None), headers, timeout)
    try:
        described = json.loads(content)["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]
        found = described["example"] if "example" in described else _first(described["examples"])["value"]
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise Mistake(f"{origin}/openapi.json (status {status}) has no example of a request: {hint}") from error
    return Payload(json.dumps(found, separators=(",", ":")).encode(), "application/json")


def try_once(request: Request, timeout: float) -> None:
    """Send the first request. Raises Mistake where nobody answers, or the answer says that it makes no sense."""
    status, content = _exchange(request.target, request.method, request.payloads[0], request.headers, timeout)
    # 408 and 429 are about load, which is what is to be measured.
    if 300 <= status < 500 and status not in (408, 429):
        text = " ".join(content.decode("utf-8", "replace").split())[:200]
        raise Mistake(f"{request.method} {request.target.url} is answered with {status}: {text}")


def _exchange(
    target: Target, method: str, payload: Payload, headers: dict[str, str], timeout: float
) -> tuple[int, bytes]:
    """(status, body) of one request, without Locust, which would patch this process."""
    parts = urlsplit(target.origin)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=timeout)
    kinds = {"Content-Type": payload.content_type} if payload.content_type else {}
    try:
        connection.request(method, target.path, payload.body, {**kinds, **headers})
        response = connection.getresponse()
        return response.status, response.read(MAX_EXAMPLE_BYTES)
    except ssl.SSLError as error:
        raise Mistake(
            f"{target.origin}: TLS fails ({error.reason}); SSL_CERT_FILE names further authorities"
        ) from error
    except TimeoutError as error:
        raise Mistake(f"{target.url} gives no answer within {timeout:g} s (--timeout)") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise Mistake(f"nothing answers at {target.origin} ({reason}); is the server up?") from error
    finally:
        connection.close()


def _first(entries: dict[str, Any]) -> Any:
    return next(iter(entries.values()))


def _file_text(key: str, file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise Mistake(f"--header {key}: {file} can't be read ({reason})") from error

"""Who may ask: API keys and admin keys from files, and how often: a token bucket for each client."""

from __future__ import annotations

import hashlib
import hmac
import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from serving.errors import Mistake
from serving.front.http import Request
from serving.front.refusal import Refusal, retry_after

HASHED = "sha256:"
MOST_BUCKETS = 65_536
SHORTEST_KEY = 16
_LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1", ""}
_NO_DIGEST = bytes(32)


@dataclass(frozen=True)
class Keys:
    """The keys of one file, as hashes."""

    path: Path
    names: dict[bytes, str]
    """SHA-256 of a key -> its name, which the request log tells."""

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Read `name KEY`, `KEY`, or either with `sha256:HEX` for the key, one a line; `#` begins a comment.

        Raises Mistake with the line, never with its contents.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise Mistake(f"{path}: can't be read ({getattr(error, 'strerror', None) or 'not UTF-8'})") from error
        names: dict[bytes, str] = {}
        for number, line in enumerate(lines, 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            if len(words) > 2:
                raise Mistake(f"{path}:{number}: expected `NAME KEY` or `KEY`")
            digest = _digest(words[-1], path, number)
            if digest in names:
                raise Mistake(f"{path}:{number}: the same key stands in an earlier line")
            names[digest] = words[0] if len(words) == 2 else f"key-{number}"
        if not names:
            raise Mistake(f"{path}: holds no key")
        return cls(path, names)

    def name_of(self, key: bytes) -> str | None:
        """Whose key that is; takes as long for a wrong key as for a right one."""
        digest = hashlib.sha256(key).digest()
        name = self.names.get(digest)  # the lookup's time depends on a hash of the key alone
        is_known = hmac.compare_digest(digest, digest if name is not None else _NO_DIGEST)
        return name if is_known else None


class Access:
    """The rules for all routes. Raises Refusal where a request may not go on."""

    def __init__(self, api_keys: Path | None, admin_keys: Path | None, rate: float | None) -> None:
        self._api_path, self._admin_path = api_keys, admin_keys
        self._buckets = Buckets(rate) if rate else None
        self.reload()

    def reload(self) -> None:
        """Read the files again. Raises Mistake, and what was read before stays in force."""
        api = Keys.read(self._api_path) if self._api_path else None
        admin = Keys.read(self._admin_path) if self._admin_path else None
        self._api, self._admin = api, admin

    @property
    def has_keys(self) -> bool:
        return self._api is not None or self._admin is not None

    def client(self, request: Request) -> str:
        """Name of the client's key, or empty where none is asked for. Raises Refusal 401."""
        if self._api is None:
            return ""
        return self._named(request, self._api, self._admin)

    def admin(self, request: Request) -> str:
        """Name of the admin's key. Raises Refusal 401 or 403."""
        if self._admin is not None:
            return self._named(request, self._admin)
        if self._api is not None:
            raise Refusal(403, "the server has no admin keys (--admin-keys), so nobody may do this")
        if request.client not in _LOOPBACK:
            raise Refusal(403, "only from the server's own machine, or with an admin key (--admin-keys)")
        origin = request.headers.get(b"origin")
        if origin is not None and origin.partition(b"://")[2] != request.headers.get(b"host"):
            raise Refusal(403, "not from another site's page")
        return ""

    def count(self, request: Request, name: str) -> None:
        """One more request of this client. Raises Refusal 429."""
        if self._buckets is not None:
            wait = self._buckets.take(name or request.client, request.started)
            if wait:
                raise Refusal(429, "too many requests from this client", headers=retry_after(wait))

    def _named(self, request: Request, *accepted: Keys | None) -> str:
        key = _key_of(request)
        if key is None:
            what = "an API key is needed: Authorization: Bearer KEY, or X-API-Key: KEY"
            raise Refusal(401, what, headers=b"www-authenticate: Bearer\r\n")
        found = [keys.name_of(key) for keys in accepted if keys is not None]
        for name in found:
            if name is not None:
                return name
        raise Refusal(401, "this API key is not known here", headers=b"www-authenticate: Bearer\r\n")


class Buckets:
    """A token bucket for each client: `rate` requests a second, and a second's worth at once."""

    def __init__(self, rate: float) -> None:
        self._rate, self._burst = rate, max(1.0, math.ceil(rate))
        self._clients: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str, now: float) -> float:
        """0 when the request may go on, else the seconds until it might."""
        tokens, then = self._clients.pop(client, (self._burst, now))
        tokens = min(self._burst, tokens + (now - then) * self._rate)
        wait = 0.0 if tokens >= 1.0 else (1.0 - tokens) / self._rate
        self._clients[client] = (tokens if wait else tokens - 1.0, now)
        if len(self._clients) > MOST_BUCKETS:
            self._clients.popitem(last=False)  # the one that has been quiet for longest
        return wait


def _key_of(request: Request) -> bytes | None:
    key = request.headers.get(b"x-api-key")
    if key is not None:
        return key.strip()
    scheme, _, key = request.headers.get(b"authorization", b"").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" and key.strip() else None


def _digest(text: str, path: Path, number: int) -> bytes:
    if text.startswith(HASHED):
        try:
            digest = bytes.fromhex(text.removeprefix(HASHED))
        except ValueError:
            digest = b""
        if len(digest) != 32:
            raise Mistake(f"{path}:{number}: sha256: wants 64 hex digits after it")
        return digest
    if len(text) < SHORTEST_KEY:
        raise Mistake(f"{path}:{number}: a key has at least {SHORTEST_KEY} characters")
    return hashlib.sha256(text.encode()).digest()

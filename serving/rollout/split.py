"""Which version a request is sent to: by header, by key, or by a draw; with the chance that the new one had."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie

from serving.rollout.plan import Split

VERSION_HEADER = "X-Model-Version"
KEYS = 1_000_000
"""Keys whose first request is remembered; the oldest are forgotten beyond."""
RECORD = struct.Struct("<Qd")
"""A key's hash and the share at which it was last drawn, in the file that survives a kill."""


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes."""

    is_new: bool
    share: float | None
    """Chance of the new version in a draw that counts as evidence; None where nothing was drawn for this request."""
    key: str | None = None
    """What it sticks to."""


class Splitter:
    """Splits requests by `Split`. The same `salt` gives the same keys the same version.

    A key is drawn once, so only its first request at a share counts as drawn: a thousand requests of one client that
    fails everywhere are one draw. When the share grows, keys of the old version are drawn again, with the chance that
    this gives them.
    """

    def __init__(self, split: Split, salt: str) -> None:
        self._split, self._salt = split, salt.encode()
        self._draw = random.Random()
        name, _, value = split.header.partition(":")
        self._header, self._value = name.strip(), value.strip()
        self._kind, _, self._name = split.sticky.partition(":")
        self._seen: dict[int, float] = {}
        self.fresh: list[tuple[int, float]] = []
        """Keys drawn since the owner last wrote them down."""

    def route(
        self, headers: Mapping[str, str], client: str, weight: float, versions: tuple[str, str] = ("", "")
    ) -> Route:
        """Where to send a request while the new version has `weight`, 0 to 1, of the traffic.

        Args:
            versions: the old and the new version's own names, which `X-Model-Version` may ask for.
        """
        wanted = headers.get(VERSION_HEADER)
        if wanted is not None and wanted in ("new", "old", *filter(None, versions)):
            return Route(wanted == "new" or (wanted == versions[1] and wanted != versions[0]), None)
        if self._header and headers.get(self._header) == self._value:
            return Route(True, None)
        key = self._key(headers, client)
        if key is None:
            return Route(self._draw.random() < weight, weight)
        return self._sticky(key, weight)

    def remember(self, data: bytes) -> None:
        """Take up what an earlier process wrote down."""
        self._seen.update(RECORD.iter_unpack(data))

    def written(self) -> bytes:
        """The fresh keys as bytes, which are fresh no longer."""
        data = b"".join(RECORD.pack(*entry) for entry in self.fresh)
        self.fresh = []
        return data

    def _sticky(self, key: str, weight: float) -> Route:
        number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8, key=self._salt[:64]).digest(), "little")
        place = number / 2.0**64
        is_new = place < weight
        before = self._seen.get(number)
        if before is not None and (before >= weight or place < before):
            return Route(is_new, None, key)
        share = weight if before is None else (weight - before) / (1.0 - before)
        if before is None and len(self._seen) >= KEYS:
            del self._seen[next(iter(self._seen))]
        self._seen[number] = weight
        self.fresh.append((number, weight))
        return Route(is_new, share, key)

    def _key(self, headers: Mapping[str, str], client: str) -> str | None:
        match self._kind:
            case "":
                return None
            case "client":
                return client
            case "api-key":
                return headers.get("Authorization") or headers.get("X-API-Key")
            case "header":
                return headers.get(self._name.strip())
            case _:
                try:
                    cookie = SimpleCookie(headers.get("Cookie", "")).get(self._name.strip())
                except CookieError:
                    return None
                return cookie.value if cookie is not None else None

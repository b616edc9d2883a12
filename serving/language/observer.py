"""Who is told what happens in the engines: metrics, the log."""

from __future__ import annotations

from typing import Literal, Protocol

Kind = Literal["prompt", "completion"]


class LanguageObserver(Protocol):
    """Called on the event loop; must be quick and must not raise."""

    def tokens(self, model: str, version: str, kind: Kind, count: int) -> None:
        """Tokens that were read or made."""
        ...

    def first_token(self, model: str, version: str, seconds: float) -> None:
        """A request's first token was there this long after the request."""
        ...

    def between_tokens(self, model: str, version: str, seconds: float) -> None:
        """Time between two tokens of one answer."""
        ...

    def worker(self, model: str, event: str, detail: str) -> None:
        """An engine is `up`, `lost`, `hung`, or `failed` to start; `detail` is one line."""
        ...


class Silent:
    """An observer that tells nobody."""

    def tokens(self, model: str, version: str, kind: Kind, count: int) -> None:
        pass

    def first_token(self, model: str, version: str, seconds: float) -> None:
        pass

    def between_tokens(self, model: str, version: str, seconds: float) -> None:
        pass

    def worker(self, model: str, event: str, detail: str) -> None:
        pass

"""Who is told what happens between the front and the workers: metrics, the log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Observer(Protocol):
    """Called on the event loop; must be quick and must not raise."""

    def batch(self, model: str, version: str, size: int, queue_seconds: Sequence[float], run_seconds: float) -> None:
        """A batch of `size` samples was answered; each of its requests had waited `queue_seconds`."""
        ...

    def worker(self, model: str, event: str, detail: str) -> None:
        """A worker is `up`, `lost`, `hung`, or `failed` to start; `detail` is one line."""
        ...


class Silent:
    """An observer that tells nobody."""

    def batch(self, model: str, version: str, size: int, queue_seconds: Sequence[float], run_seconds: float) -> None:
        pass

    def worker(self, model: str, event: str, detail: str) -> None:
        pass

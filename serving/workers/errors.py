"""Why a request has no answer. The messages are fit for its client; details are in the log."""

from __future__ import annotations

from serving.errors import ServingError


class Unavailable(ServingError):
    """Not now; the same request may be answered later."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds after which it is worth trying again."""


class Overloaded(Unavailable):
    """The queue is full."""


class WorkerLost(Unavailable):
    """The process that held the request ended, or there is none that could take it."""


class Draining(Unavailable):
    """The server takes no more requests: it is about to end."""


class TooMany(ServingError):
    """One request with more than the queue could ever hold."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"too much in one request: at most {limit} instances")
        self.limit = limit


class DeadlineExceeded(ServingError):
    """The request's time was up before its answer was there."""


class Failed(ServingError):
    """The program failed on this sample, or a worker on its batch."""

"""Trainings apart from a search, on its workers: nobody judges them, and they are told from trials by their names."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer.errors import TrainerError
from trainer.search.channel import Message
from trainer.verdict import Verdict

if TYPE_CHECKING:
    from trainer.preemption import Preemption
    from trainer.search.pool import Event, Place, Pool

TURN_SECONDS = 0.5
STOP_SECONDS = 60.0
"""How long trainings may take to save and end after a wish to stop."""
LOSSES = 1
"""How often a training whose worker is lost is begun or gone on with again."""


class Stopped(TrainerError):
    """There was a wish to stop; what had been trained is kept, and found when the same is asked for again."""


class Apart:
    """Runs orders (see `drive.order`), each once, on as many workers as there are."""

    def __init__(self, pool: Pool, wish: Preemption) -> None:
        self._pool, self._wish = pool, wish
        self._waiting: list[Message] = []
        self._running: dict[int, Message] = {}
        """Number, as the pool knows it -> order."""
        self._losses: dict[str, int] = {}
        self._done: dict[str, Message] = {}

    def run(self, orders: Sequence[Message]) -> dict[str, Message]:
        """Name of each order -> how it ended. Raises Stopped after a wish to stop."""
        self._waiting, self._running, self._done = list(orders), {}, {}
        while self._waiting or self._running:
            if self._wish.requested:
                self._stop()
            self._fill()
            for event in self._pool.wait(TURN_SECONDS):
                self._handle(event)
        return self._done

    def _fill(self) -> None:
        for place in self._pool.free():
            if not self._waiting:
                return
            order = self._waiting.pop(0)
            number = len(self._done) + len(self._running)
            while number in self._running:
                number += 1
            self._running[number] = order
            self._pool.run(place, number, order)

    def _handle(self, event: Event) -> None:
        number = event.place.trial
        if number is None:
            return
        kind = event.message["event"] if event.message is not None else "lost"
        if kind == "report":
            self._pool.answer(event.place, {"verdict": str(Verdict.CONTINUE)})
        elif kind == "started":
            self._pool.go_on(event.place)
        else:
            self._end(number, event.place, event.message or {"status": "died", "error": event.why})

    def _end(self, number: int, place: Place, message: Message) -> None:
        self._pool.leave(place)
        order = self._running.pop(number)
        name = order["name"]
        lost = self._losses.get(name, 0)
        if message["status"] == "died" and lost < LOSSES:
            self._losses[name] = lost + 1
            self._waiting.append(order)
        else:
            self._done[name] = message

    def _stop(self) -> None:
        self._waiting = []
        self._pool.interrupt(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while self._running and time.monotonic() < deadline:
            for event in self._pool.wait(TURN_SECONDS):
                self._handle(event)
        raise Stopped(f"stopped by {self._wish.signal_name} after the search, in what comes after it")

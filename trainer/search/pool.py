"""The workers of a search, seen from its driver: how many fit, which is free, what happened next."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainer.errors import TrainerError, UserError
from trainer.search import cluster
from trainer.search.channel import Message
from trainer.search.cluster import Need

LOOK_SECONDS = 5.0
"""Between two looks at how many nodes there are."""
WAIT_SECONDS = 10.0
"""A longer wait for a worker is told."""
BROKEN = 3
"""Workers that can't be started in a row: then the others will not, either."""


@dataclass
class Place:
    """One worker, and what it was last asked for."""

    actor: Any
    pending: Any
    """Reference to its next event."""
    trial: int | None = None
    """The trial that runs there; None while it starts, or is free."""
    is_ready: bool = False
    since: float = 0.0
    """When its trial began to hold it, by `time.monotonic`."""


@dataclass(frozen=True)
class Event:
    """What a worker says; `message` is None where the worker itself is gone."""

    place: Place
    message: Message | None
    why: str = ""


class Pool:
    """As many workers as fit and are wanted; one that is gone is replaced where there is room."""

    def __init__(self, setup: Message, need: Need, most: int, say: Callable[[str], None]) -> None:
        """`setup` is what `Worker` takes. Raises UserError where the cluster has no node for even one trial."""
        from trainer.search.worker import remote

        self._setup, self._need, self._most, self._say = setup, need, most, say
        self._actor_class = remote(need.cpus, need.gpus)
        self.size = min(cluster.places(cluster.nodes(), need), most)
        """How many trials can run at once right now."""
        self._places: list[Place] = []
        self._looked = time.monotonic()
        self._waits_since = time.monotonic()
        self._has_told = False
        self._broken = 0
        self._grow()

    def free(self) -> list[Place]:
        """Workers that wait for a trial."""
        return [place for place in self._places if place.is_ready and place.trial is None]

    def busy(self) -> list[Place]:
        """Workers that have one."""
        return [place for place in self._places if place.trial is not None]

    def run(self, place: Place, trial: int, order: Message) -> None:
        """Start a trial on a free worker."""
        place.trial, place.since = trial, time.monotonic()
        place.pending = place.actor.run.remote(order)

    def answer(self, place: Place, verdict: Message) -> None:
        """Tell the trial what its report led to."""
        place.pending = place.actor.answer.remote(verdict)

    def go_on(self, place: Place) -> None:
        """Wait for the next event of a trial that wants no answer."""
        place.pending = place.actor.next.remote()

    def leave(self, place: Place) -> float:
        """The trial is over; returns the seconds that it held the worker."""
        place.trial, place.pending = None, None
        return time.monotonic() - place.since

    def interrupt(self, number: int) -> None:
        """Signal all running trials."""
        for place in self.busy():
            place.actor.interrupt.remote(number)

    def wait(self, timeout: float) -> list[Event]:
        """What has happened, after at most `timeout` seconds; events of one worker never come two at a time."""
        import ray

        self._look()
        pending = {place.pending: place for place in self._places if place.pending is not None}
        if not pending:
            time.sleep(min(timeout, 0.05))
            return []
        ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=0)
        if not ready:
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=timeout)
        events = []
        for reference in ready:
            event = self._take(pending[reference])
            if event is not None:
                events.append(event)
        return events

    def close(self) -> None:
        """End all workers, and their trials with them."""
        import ray

        for place in self._places:
            ray.kill(place.actor)
        self._places = []

    def _take(self, place: Place) -> Event | None:
        """The event of a worker; None where it only said that it is ready."""
        import ray

        try:
            message: Message = ray.get(place.pending)
        except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError) as error:
            ray.kill(place.actor)  # an error in it, of which nothing is known, is no better than its death
            self._places.remove(place)
            self.size = len(self._places)
            if not place.is_ready:
                self._count_broken(_one_line(error))
                return None
            return Event(place, None, _one_line(error))
        if place.is_ready:
            return Event(place, message)
        place.pending = None
        if message["event"] != "ready":
            self._refuse(place, message)
            return None
        place.is_ready, self._broken = True, 0
        return None

    def _refuse(self, place: Place, message: Message) -> None:
        """A worker that can't work: an error for the search, or at first another try, elsewhere perhaps."""
        import ray

        if message["event"] == "unseen":
            raise TrainerError(
                f"{self._setup['search']} can't be seen on {message['host']}: a search on several nodes needs a folder "
                "that all of them share; set runs_dir to one"
            )
        if message.get("is_mistake"):
            raise UserError(message["error"])
        self._places.remove(place)
        ray.kill(place.actor)
        self._count_broken(message["error"])

    def _count_broken(self, why: str) -> None:
        self._broken += 1
        if self._broken >= BROKEN:
            raise TrainerError(f"workers can't get ready: {why}; see {self._setup['logs']}")

    def _look(self) -> None:
        """Add workers where nodes have come, and say so where none comes."""
        now = time.monotonic()
        if any(place.is_ready for place in self._places):
            self._waits_since, self._has_told = now, False
        elif not self._has_told and now - self._waits_since > WAIT_SECONDS:
            self._say("waiting for a worker: for a place in the cluster, its imports, the data ...")
            self._has_told = True
        if now - self._looked >= LOOK_SECONDS or len(self._places) < self.size:
            self._looked = now
            self.size = min(sum(node.places(self._need) for node in cluster.nodes()), self._most)
            self._grow()

    def _grow(self) -> None:
        while len(self._places) < self.size:
            actor = self._actor_class.remote(self._setup)
            self._places.append(Place(actor, actor.ready.remote()))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__

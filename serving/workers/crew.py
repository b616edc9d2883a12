"""The workers of one version: started, kept up, ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from serving.bundle import Bundle
from serving.errors import Mistake, ServingError
from serving.workers.messages import Load
from serving.workers.nursery import Nursery
from serving.workers.observer import Observer
from serving.workers.queue import Taken
from serving.workers.settings import Settings
from serving.workers.worker import StartFailed, Unborn, Worker

if TYPE_CHECKING:
    from serving.workers.messages import Item

SHORT_LIFE = 2.0
"""Seconds; a worker that ends within them has not come up for good, and the next one waits."""
FIRST_WAIT, LONGEST_WAIT = 0.1, 30.0
"""Seconds before another try, doubled each time."""


class Crew:
    """As many workers as are wanted, of one bundle."""

    def __init__(
        self,
        name: str,
        bundle: Bundle,
        settings: Settings,
        nursery: Nursery,
        observer: Observer,
        answered: Callable[[Worker, Taken, list[Item], float], None],
        lost: Callable[[Worker], None],
        changed: Callable[[], None],
    ) -> None:
        """`changed` is called when a worker has come up, or could not."""
        self._name, self._bundle, self._settings, self._nursery = name, bundle, settings, nursery
        self._observer, self._answered, self._lost, self._changed = observer, answered, lost, changed
        self.workers: list[Worker] = []
        """One for each place; not all of them need be up."""
        self.restarts = 0
        self.reason = ""
        """Why the last try to replace a worker failed; empty where it did not."""
        self.wait = 0.0
        """Seconds until the next try."""
        self._keepers: list[asyncio.Task[None]] = []

    @property
    def up(self) -> list[Worker]:
        """Those that take batches."""
        return [worker for worker in self.workers if worker.is_up]

    @property
    def is_broken(self) -> bool:
        """Nobody is up, and the last try to change that failed."""
        return bool(self.reason) and not self.up

    async def start(self) -> None:
        """All of them, or none. Raises Mistake where the bundle is at fault, ServingError otherwise.

        The first compares the hashes before any of them loads the program.
        """
        try:
            async with asyncio.timeout(self._settings.start_seconds):
                await (await self._spawn(0, verify=True)).verified()
                for place in range(1, self._settings.workers):
                    await self._spawn(place, verify=False)
                ready = await asyncio.gather(*(worker.ready() for worker in self.workers))
        except BaseException as error:
            await asyncio.gather(*(worker.kill() for worker in self.workers))
            if isinstance(error, StartFailed):
                how = next((f" ({worker.exit})" for worker in self.workers if worker.died_early), "")
                raise (Mistake if error.is_mistake else ServingError)(f"{error}{how}") from error
            if isinstance(error, TimeoutError):
                limit = self._settings.start_seconds
                raise ServingError(f"{self._bundle.path}: its workers did not come up in {limit:g} s") from error
            raise
        self._nursery.learn(ready[0].modules)
        for place in range(len(self.workers)):
            self._observer.worker(self._name, "up", f"process {self.workers[place].pid}")
            self._keepers.append(asyncio.create_task(self._keep(place)))

    async def end(self) -> None:
        """End all, after what they hold."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.gather(*(worker.end() for worker in self.workers))

    def strike_all(self) -> None:
        """SIGKILL to all."""
        for worker in self.workers:
            worker.strike()

    async def _spawn(self, place: int, verify: bool) -> Worker:
        """A worker in that place that has been given its work. Raises StartFailed."""
        settings = self._settings
        load = Load(
            path=str(self._bundle.path),
            version=self._bundle.version,
            threads=settings.threads_each(),
            may_use_one=settings.threads is None,
            device=settings.device,
            max_batch=largest_batch(self._bundle, settings),
            verify=verify,
        )
        try:
            return await self._given(place, load)
        except Unborn:  # there is a new zygote by the next order
            return await self._given(place, load)

    async def _given(self, place: int, load: Load) -> Worker:
        worker = Worker(self._answered, self._lost)
        self.workers[place : place + 1] = [worker]
        await worker.start(self._nursery, modules_for(self._bundle), load)
        return worker

    async def _keep(self, place: int) -> None:
        """Replace the worker of a place each time that it ends."""
        failures = 0
        while True:
            worker, came_up = self.workers[place], time.monotonic()
            await worker.gone()
            self._observer.worker(self._name, "lost", f"process {worker.pid}: {worker.exit}")
            failures = failures + 1 if time.monotonic() - came_up < SHORT_LIFE else 0
            while not await self._replace(place, failures):
                failures += 1
            self.restarts += 1
            self._changed()

    async def _replace(self, place: int, failures: int) -> bool:
        self.wait = min(LONGEST_WAIT, FIRST_WAIT * 2**failures) if failures else 0.0
        await asyncio.sleep(self.wait)
        try:
            async with asyncio.timeout(self._settings.start_seconds):
                # The files may have changed since the first looked at them.
                await (await self._spawn(place, verify=True)).ready()
        except (StartFailed, TimeoutError) as error:
            worker = self.workers[place]
            await worker.kill()
            how = f" ({worker.exit})" if worker.died_early else ""
            self.reason = f"{error}{how}" if isinstance(error, StartFailed) else "a worker did not come up in time"
            self._observer.worker(self._name, "failed", self.reason)
            self._changed()
            return False
        except BaseException:
            with suppress(asyncio.CancelledError):
                await self.workers[place].kill()
            raise
        self.reason = ""
        self._observer.worker(self._name, "up", f"process {self.workers[place].pid}")
        return True


def largest_batch(bundle: Bundle, settings: Settings) -> int:
    """Samples that one batch may have."""
    return min(settings.max_batch, bundle.program.max_batch or settings.max_batch)


_HEAVY = {"pt2": ["torch.export.pt2_archive._package"]}
"""What `torch.export.load` imports when it is first called: 2 s that the zygote takes while nobody waits."""


def modules_for(bundle: Bundle) -> list[str]:
    """What a worker of this bundle imports, for the zygote to import once."""
    kinds = [
        ("runtimes", bundle.program.runtime),
        ("inputs", bundle.preprocessing.get("kind")),
        ("outputs", bundle.postprocessing.get("kind")),
    ]
    here = Path(__file__).parents[1]
    found = _HEAVY.get(bundle.program.runtime, [])
    return found + [f"serving.{room}.{kind}" for room, kind in kinds if (here / room / f"{kind}.py").is_file()]

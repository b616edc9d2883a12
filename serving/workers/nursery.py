"""The zygote, seen from the front: one for all models."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path

import msgspec

from serving.errors import ServingError
from serving.pictures import MAX_PIXELS
from serving.workers import kinship
from serving.workers.zygote import NAMES_AT_ONCE, Order

END_SECONDS = 5.0
INSIDE = "SERVING_WORKER"
"""Environment variable that is set in the zygote and the workers."""


class Nursery:
    """Has workers forked; starts the zygote, and starts it again where it was killed."""

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._known: dict[str, None] = {}
        """Modules that the zygote was told to import."""

    @classmethod
    def open(cls, max_pixels: int) -> Nursery:
        """Start it; returns at once, while the zygote imports.

        This process becomes the parent of the workers. Call it on the thread that lives as long as the process.

        Args:
            max_pixels: pictures of more are refused undecoded.

        Raises:
            ServingError: this process is a zygote or a worker itself.
        """
        if INSIDE in os.environ:
            # What is imported there may be a program that is not meant to be: it would start itself over and over.
            raise ServingError("a worker of the server starts a server: is a script named like a module?")
        kinship.adopt_orphans(True)
        nursery = cls(max_pixels)
        nursery._start()
        return nursery

    @property
    def pid(self) -> int | None:
        """Of the zygote."""
        return self._process.pid if self._process is not None else None

    def fork(self, end: socket.socket, modules: list[str]) -> None:
        """A new worker at the other end of `end`, which stays the caller's to close.

        Whether it comes to life is told there. Raises OSError where no process can be started.
        """
        self.learn(modules)
        order = msgspec.json.encode(Order([]))
        try:
            self._send(order, end)
        except (BrokenPipeError, ConnectionError):
            known, self._known = self._known, {}
            self._start()
            self.learn(list(known))
            self._send(order, end)

    def learn(self, modules: list[str]) -> None:
        """What a worker had to import itself: the next one will have it."""
        new = [name for name in modules if name not in self._known]
        self._known.update(dict.fromkeys(new))
        if new and self._control is not None:
            with suppress(OSError):  # it is only quicker
                for start in range(0, len(new), NAMES_AT_ONCE):
                    self._control.send(msgspec.json.encode(Order(new[start : start + NAMES_AT_ONCE])))

    async def close(self) -> None:
        """End the zygote; workers live on, and this process stays the parent of orphans."""
        self._let_go()
        process, self._process = self._process, None
        if process is None:
            return
        try:
            async with asyncio.timeout(END_SECONDS):
                await _ended(process)
        except TimeoutError:  # in an import that hangs
            process.kill()
            await _ended(process)

    def _send(self, order: bytes, end: socket.socket) -> None:
        if self._control is None:
            raise ServingError("the nursery is closed")
        socket.send_fds(self._control, [order], [end.fileno()])

    def _let_go(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None

    def _start(self) -> None:
        self._let_go()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "serving.workers.zygote", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**_PREFERRED, **os.environ, **_NEEDED, **_path(), MAX_PIXELS: str(self._max_pixels)},
            )
        ours.setblocking(False)
        self._control = ours


# Threads that spin while they wait for work take the cores that the front and other workers need. Alone on two cores,
# spinning takes a fifth off ResNet-18's time for one picture; two servers beside each other lose half of their answers.
_PREFERRED = {"OMP_WAIT_POLICY": "PASSIVE"}
_NEEDED = {
    INSIDE: "1",
    # A pool of threads would not survive the fork; a worker sets its own number.
    "OMP_NUM_THREADS": "1",
    # numpy's own pool: its threads would be started by the import, and the model does not run in numpy.
    "OPENBLAS_NUM_THREADS": "1",
    "NO_ALBUMENTATIONS_UPDATE": "1",
}


def _path() -> dict[str, str]:
    """Where the zygote finds this package; not the folder of the program that runs here, nor the current one."""
    root = str(Path(__file__).parents[2])
    if root in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}


async def _ended(process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        await asyncio.sleep(0.01)

"""Taking turns: contenders train in processes of their own, of which one runs at a time and the others stand still.

Every training step of every contender calls `Turns.tick` once, where it fetches its batch. The clock thus sits in
what all contenders share, and none of them has to be changed to be measured.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

START_SECONDS = 120.0


class Turns:
    """In the contender: counts steps, reports how long they took, waits for the next turn."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._left = 1
        self._measured = -1
        self._began = 0.0

    def tick(self) -> None:
        """Called once a step. At the end of a turn it returns when the next one begins."""
        self._left -= 1
        if self._left == self._measured:
            self._began = time.perf_counter()
        elif self._left == 0:
            self._connection.send(time.perf_counter() - self._began)
            warmup, self._measured = self._connection.recv()
            self._left = warmup + self._measured


_turns: Turns | None = None


def begin(connection: Connection) -> None:
    """Make the clock of this process."""
    global _turns
    _turns = Turns(connection)


def tick() -> None:
    """One step of this process begins."""
    assert _turns is not None
    _turns.tick()


@dataclass
class Contender:
    """In the parent: one contender, and the times that its turns took."""

    name: str
    process: BaseProcess
    connection: Connection
    log: Path

    def turn(self, warmup: int, steps: int) -> float:
        """Let it take `warmup` steps and then `steps` measured ones; returns the seconds of these."""
        seconds: float = self.ask((warmup, steps))
        return seconds

    def ask(self, order: Any) -> Any:
        """Send an order, let it run until it answers, and return that."""
        tree = self._tree()
        self.connection.send(order)
        for process in tree:
            process.send_signal(signal.SIGCONT)
        answer = self._hear()
        self.pause()
        return answer

    def pause(self) -> None:
        """Stop it and its children, so that whoever has the next turn has the machine."""
        for process in self._tree():
            process.send_signal(signal.SIGSTOP)

    def end(self) -> None:
        tree = self._tree() if self.process.is_alive() else []
        for process in tree:
            process.kill()
        self.process.join()

    def wait_until_ready(self) -> None:
        """Until it is at its first step."""
        if not self.connection.poll(START_SECONDS):
            raise RuntimeError(f"{self.name} took no step within {START_SECONDS:.0f} s: {self._last_words()}")
        self._hear()

    def _hear(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError:
            raise RuntimeError(f"{self.name} ended before its time: {self._last_words()}") from None

    def _tree(self) -> list[psutil.Process]:
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def _last_words(self) -> str:
        return self.log.read_text()[-2000:]


@contextmanager
def contenders(
    context: ForkServerContext, targets: dict[str, Callable[[Connection, Path], None]], folder: Path
) -> Iterator[dict[str, Contender]]:
    """Start all, wait until all are at their first step, and end them after use.

    Each target is called with its connection and the file for what it prints.
    """
    started: dict[str, Contender] = {}
    try:
        for number, (name, target) in enumerate(targets.items()):
            here, there = context.Pipe()
            log = folder / f"{number}.log"
            process = context.Process(target=target, args=(there, log))
            process.start()
            there.close()
            started[name] = Contender(name, process, here, log)
        for contender in started.values():
            contender.wait_until_ready()
        yield started
    finally:
        for contender in started.values():
            contender.end()

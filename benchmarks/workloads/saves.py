"""What the contenders of `checkpoint.py` have in common: the model, and the clock of a turn with one save in it."""

from __future__ import annotations

import importlib
import os
import statistics
import threading
import time
import warnings
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

WIDTH = 1024
BYTES_PER_WEIGHT = 12
"""fp32: the weight and AdamW's two averages."""
BATCH = 16
PLAIN_STEPS = 4


@dataclass
class Turn:
    """What one save costs; seconds."""

    stall: float = 0.0
    """The training thread stands still for."""
    second: float = 0.0
    """It stands still for a second save that comes at once, while the first is still being written."""
    durable: float = 0.0
    """From the beginning of the save until it has reached the disk (fsync)."""
    lost: float = 0.0
    """The training ends so much later: the stall, and steps that are slower beside the writing."""
    step: float = 0.0
    """A step without a save."""


class Clock:
    """In the contender: takes the times of a turn, reports them, and waits for the next turn.

    A turn is three saves, with plain steps before each: one that is not counted, since it finds memory that the machine
    may have taken from a process that stood still; one; and one with another at once after it.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._counted: list[Turn] = []
        self._turn: Turn | None = None
        self._steps: list[float] = []
        self._after: list[float] = []
        self._durable = threading.Event()
        self._began = self._ended = 0.0
        self.wants_save = False
        """Whether the step that goes on now is to end with a save."""

    def first_step(self) -> None:
        """Set-up is done: wait for the first turn."""
        self._connection.send(None)
        self._wait()

    def tick(self) -> None:
        """A step begins. At the end of a turn this returns when the next one begins."""
        took = time.perf_counter() - self._last
        if self._turn is None:
            self._steps.append(took)
        else:
            self._after.append(took)
            if self._durable.is_set():
                self._end_of_save(self._turn)
        self.wants_save = self._turn is None and len(self._steps) > PLAIN_STEPS
        self._last = time.perf_counter()

    @property
    def is_twice(self) -> bool:
        """Whether two saves are wanted, one at once after the other."""
        return len(self._counted) == 2

    def saved(self, began: float, stall: float, second: float = 0.0) -> None:
        """The save that was wanted, which began at `began`, no longer holds the training thread."""
        self.wants_save = False
        self._durable.clear()
        self._began = began
        self._turn = Turn(stall=stall, second=second, step=statistics.median(self._steps[1:]))
        self._after = []
        self._last = time.perf_counter()

    def is_durable(self) -> None:
        """The save is on the disk; from any thread."""
        self._ended = time.perf_counter()
        self._durable.set()

    def _end_of_save(self, turn: Turn) -> None:
        turn.durable = self._ended - self._began
        turn.lost = turn.stall + max(0.0, sum(self._after) - len(self._after) * turn.step)
        self._counted.append(turn)
        self._turn, self._steps = None, []
        if len(self._counted) == 3:
            first, once, twice = self._counted
            self._connection.send((asdict(first), {**asdict(once), "second": twice.second}))
            self._wait()

    def _wait(self) -> None:
        self._connection.recv()
        self._counted, self._turn, self._steps = [], None, []
        self._last = time.perf_counter()


def sync(path: Path) -> None:
    """Bring a file and its name to the disk, as peers don't."""
    for place in (path, path.parent):
        descriptor = os.open(place, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def build(megabytes: int) -> nn.Module:
    """A model that makes about so much state (10^6 bytes) with AdamW, of layers as large as those of real ones."""
    from torch import nn

    layers = max(1, round(megabytes * 1e6 / BYTES_PER_WEIGHT / (WIDTH * WIDTH + WIDTH)))
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(layers)))


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    import torch

    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def state_bytes(model: nn.Module) -> int:
    return BYTES_PER_WEIGHT * sum(parameter.numel() for parameter in model.parameters())


def start(contender: str, variant: str, megabytes: int, folder: Path, connection: Connection, log: Path) -> None:
    """Run `workloads.<contender>` in this process; see `work.start`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(file, stream)
    warnings.filterwarnings("ignore", module="lightning")
    own = folder / f"{contender}-{variant}"
    own.mkdir()
    importlib.import_module(f"workloads.{contender}").run(variant, megabytes, own, Clock(connection))

"""The frame of `trainer doctor`: a check, its verdict, and a guard around each. The checks stand beside this file."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trainer.lineage import without_password
from trainer.world import World

if TYPE_CHECKING:
    from trainer.config import RunConfig

Status = Literal["ok", "warning", "problem"]
STATUSES: tuple[Status, ...] = ("ok", "warning", "problem")
"""From good to bad."""

KB, MB, GB = 1e3, 1e6, 1e9


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: Status
    found: str
    remedy: str | None = None
    """What to do; None where all is well."""


@dataclass(frozen=True)
class Setting:
    """What is examined: the run that would be started here."""

    runs_dir: Path
    world: World = field(default_factory=World)
    config: RunConfig | None = None

    @property
    def workers(self) -> int:
        """Data workers per process."""
        return self.config.loading.workers if self.config else 0


@dataclass(frozen=True)
class Probe:
    """A function that examines one thing, and how long it may take."""

    name: str
    run: Callable[[], list[Check]]
    seconds: float = 5.0
    when_late: str = "look at the load of this machine, and run it again"
    """The remedy when it doesn't come back: something below it hangs."""


def ok(name: str, found: str) -> list[Check]:
    return [Check(name, "ok", found)]


def warning(name: str, found: str, remedy: str) -> list[Check]:
    return [Check(name, "warning", found, remedy)]


def problem(name: str, found: str, remedy: str) -> list[Check]:
    return [Check(name, "problem", found, remedy)]


def examine(probe: Probe, debug: bool = False) -> list[Check]:
    """The probe's lines; a problem in their place where it raises, or doesn't come back in its time. Never raises."""
    answer: list[list[Check]] = []

    def work() -> None:
        try:
            answer.append(probe.run())
        except Exception as error:  # whatever it is: the other checks are still wanted
            if debug:
                traceback.print_exc()
            text = without_password(f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": "))
            answer.append(problem(probe.name, f"this check failed: {text}", "`trainer doctor --debug` shows where"))

    # A thread, since a file system or a name server that is gone holds whoever asks it; as a daemon it can be left.
    thread = threading.Thread(target=work, name=probe.name, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the limit of processes is reached, which a check will tell: better unguarded than not at all
        work()
    else:
        thread.join(probe.seconds)
    if answer:
        return answer[0]
    return problem(probe.name, f"no answer within {probe.seconds:g} s", probe.when_late)


def worst(statuses: Iterable[Status]) -> Status:
    """The gravest of them; `ok` where there is none."""
    return max(statuses, key=STATUSES.index, default="ok")


def size(num_bytes: float) -> str:
    """Bytes for a reader, in decimal units: `64 MB`, `1.5 GB`."""
    for unit, name in ((1e12, "TB"), (GB, "GB"), (MB, "MB"), (KB, "kB")):
        if num_bytes >= unit:
            value = num_bytes / unit
            return f"{value:.1f} {name}" if value < 10 else f"{value:,.0f} {name}"
    return f"{num_bytes:.0f} bytes"


def listed(items: Iterable[str], shown: int = 4) -> str:
    """The first of the items, and how many more there are."""
    every = list(items)
    more = f" and {len(every) - shown} more" if len(every) > shown else ""
    return ", ".join(every[:shown]) + more

"""What the user sees of a running job: one live line block on a terminal, plain lines elsewhere. Rank 0 only."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Self, TextIO

from trainer.errors import TrainerError

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live

REFRESH_SECONDS = 0.2
LINE_SECONDS = 5.0
SPEED_MEMORY = 0.7
"""Weight of the past in the moving average of the speed, from which the time left is told."""
BAR_WIDTH = 24


class Progress:
    """Shows steps, loss, learning rate, speed, share of time waiting for data, memory, time left, last evaluation.

    It draws from within `update` and has no thread: between two log steps nothing is spent on it.
    """

    def __init__(
        self,
        total_steps: int,
        steps_per_epoch: int,
        first_step: int = 0,
        stream: TextIO | None = None,
        live: bool | None = None,
    ) -> None:
        """`live` None means: when `stream` (stderr where not given) is a terminal."""
        self._stream = sys.stderr if stream is None else stream
        self._total = total_steps
        self._epochs = -(-total_steps // max(steps_per_epoch, 1))
        self._step = first_step
        self._epoch = first_step / max(steps_per_epoch, 1)
        self._entry: Mapping[str, float] = {}
        self._evaluation = ""
        self._seconds_per_step: float | None = None
        self._step_time = time.monotonic()
        self._shown = -float("inf")
        self._is_shown = False
        self._live = self._start_live() if (_is_terminal(self._stream) if live is None else live) else None

    def update(self, step: int, epoch: float, entry: Mapping[str, float]) -> None:
        """Take the figures of a log step: `train/loss`, `lr`, `samples_per_second`, `data_wait`, `memory_gb`."""
        now = time.monotonic()
        if step > self._step:
            pace = (now - self._step_time) / (step - self._step)
            old = self._seconds_per_step
            self._seconds_per_step = pace if old is None else SPEED_MEMORY * old + (1 - SPEED_MEMORY) * pace
        self._step, self._epoch, self._entry, self._step_time = (
            step,
            epoch,
            dict(entry),
            now,
        )
        self._is_shown = False
        if now - self._shown >= (REFRESH_SECONDS if self._live else LINE_SECONDS) or step >= self._total:
            self._show(now)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of an evaluation, and keep them on display until the next."""
        values = "  ".join(f"{name}={_number(value)}" for name, value in metrics.items())
        self._evaluation = f"evaluated at step {step}: {values}"
        self._step_time = time.monotonic()
        if self._live:
            self._show(self._step_time)
        else:
            self._print(self._evaluation)

    def message(self, text: str) -> None:
        """Print a line above the display."""
        if self._live:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._print(text)

    def close(self) -> None:
        """Show the last state and leave it standing."""
        if not self._is_shown and self._entry:
            self._show(time.monotonic())
        if self._live:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _show(self, now: float) -> None:
        self._shown, self._is_shown = now, True
        if self._live:
            self._live.update(self._render(), refresh=True)
        else:
            self._print("  ".join([f"step {self._step}/{self._total}", *self._figures().values()]))

    def _figures(self) -> dict[str, str]:
        entry = self._entry
        shown = {"epoch": f"epoch {self._epoch:.2f}/{self._epochs}"}
        if "train/loss" in entry:
            shown["loss"] = f"loss {_number(entry['train/loss'])}"
        if "lr" in entry:
            shown["lr"] = f"lr {entry['lr']:.3g}"
        if "samples_per_second" in entry:
            shown["speed"] = f"{_number(entry['samples_per_second'])} samples/s"
        if "data_wait" in entry:
            shown["wait"] = f"data wait {entry['data_wait']:.0%}"
        if "memory_gb" in entry:
            shown["memory"] = f"{entry['memory_gb']:.2f} GB"
        if self._seconds_per_step is not None:
            shown["left"] = f"{clock(self._seconds_per_step * (self._total - self._step))} left"
        return shown

    def _start_live(self) -> Live:
        from rich.console import Console
        from rich.live import Live

        live = Live(
            console=Console(file=self._stream, force_terminal=True),
            auto_refresh=False,
            redirect_stdout=sys.stdout.isatty(),  # what goes into a pipe or a file is left alone
            redirect_stderr=self._stream is sys.stderr,
        )
        live.start()
        return live

    def _render(self) -> Group:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        figures = self._figures()
        head = Table.grid(padding=(0, 1))
        head.add_row(
            ProgressBar(total=max(self._total, 1), completed=self._step, width=BAR_WIDTH),
            f"{self._step}/{self._total}",
            Text(figures.pop("epoch")),
            Text(figures.pop("left", ""), style="bold"),
        )
        lines = [Text("  ".join(figures.values()))]
        if self._evaluation:
            lines.append(Text(self._evaluation, style="green"))
        return Group(head, *lines)

    def _print(self, text: str) -> None:
        print_line(text, self._stream)


def print_line(text: str, stream: TextIO | None = None) -> None:
    """Print a line (to stderr where nothing else is given); TrainerError when the file behind it takes no more."""
    try:
        print(text, file=sys.stderr if stream is None else stream, flush=True)
    except BrokenPipeError:  # whoever read it has gone, which the command line answers in its own way
        raise
    except OSError as error:
        raise TrainerError(
            f"the log (what stderr goes to) can't be written: {error.strerror}; free space or send it elsewhere, "
            "and go on with --resume"
        ) from error


def summary_table(rows: list[tuple[str, str]], title: str, stream: TextIO | None = None) -> None:
    """Print the closing table; long values, such as paths, wrap at worst and are never cut."""
    stream = sys.stderr if stream is None else stream
    if not _is_terminal(stream):
        width = max((len(name) for name, _ in rows), default=0)
        print(
            "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)]),
            file=stream,
            flush=True,
        )
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=stream)
    width = max((len(name) for name, _ in rows), default=0)
    console.print(Text(f"\n{title}", style="bold"), soft_wrap=True)
    for name, value in rows:
        line = Text.assemble("  ", (f"{name:<{width}}", "cyan"), "  ", value)
        console.print(line, soft_wrap=True, highlight=False)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], stream: TextIO | None = None) -> None:
    """Print aligned columns, on stdout where nothing else is given, the last one as long as it is: nothing is cut."""
    for line in aligned(head, rows):
        print_line(line, sys.stdout if stream is None else stream)


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (head, *rows)
    ]


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _number(value: float) -> str:
    """Four significant digits, without an exponent where a reader expects none."""
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e7):
        return f"{value:.3e}"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 4
    return f"{value:,.{digits}f}"


def clock(seconds: float) -> str:
    """Seconds as `1:05`, `2h 05m` or `3d 4h`."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}h"
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}:{rest:02}"


def duration(seconds: float) -> str:
    """Seconds as `1.2 s`, `3 min 20 s` or `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"

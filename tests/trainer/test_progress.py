"""What the user sees: on a terminal of 80 columns, and in a log file."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable

import pytest
from harness import environment

from trainer.progress import Progress, summary_table

ENTRY = {
    "train/loss": 0.2347,
    "lr": 0.00123,
    "samples_per_second": 12345.6,
    "data_wait": 0.034,
    "memory_gb": 1.234,
    "grad_norm": 1.0,
}
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def lines_of(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def on_terminal(code: str, columns: int = 80) -> str:
    """What a program writes to a terminal of this width."""
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    variables = environment(TERM="xterm-256color")
    variables.pop("COLUMNS", None)
    process = subprocess.Popen([sys.executable, "-c", code], stdin=other, stdout=other, stderr=other, env=variables)
    os.close(other)
    said = b""
    while True:
        try:
            chunk = os.read(main, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not chunk:
            break
        said += chunk
    os.close(main)
    assert process.wait(30) == 0, said.decode()
    return said.decode()


def test_plain_lines_hold_every_figure() -> None:
    stream = io.StringIO()
    with Progress(total_steps=100, steps_per_epoch=50, stream=stream) as progress:
        progress.update(10, 0.2, ENTRY)
    (line,) = lines_of(stream)
    shown, left = line.rsplit("  ", 1)
    assert shown == "step 10/100  epoch 0.20/2  loss 0.2347  lr 0.00123  12,346 samples/s  data wait 3%  1.23 GB"
    assert re.fullmatch(r"\d+:\d\d left", left)


def test_plain_lines_are_rare_but_the_last_and_each_evaluation_are_there() -> None:
    stream = io.StringIO()
    progress = Progress(total_steps=1000, steps_per_epoch=500, stream=stream)
    for step in range(1, 1001):
        progress.update(step, step / 500, ENTRY)
        if step % 500 == 0:
            progress.evaluation(step, {"val/accuracy": 0.97, "val/loss": 1e-5})
    progress.close()
    progress.close()
    kinds = [line.split(":")[0] if "evaluated" in line else line.split("  ")[0] for line in lines_of(stream)]
    assert kinds == ["step 1/1000", "evaluated at step 500", "step 1000/1000", "evaluated at step 1000"]
    assert lines_of(stream)[1] == "evaluated at step 500: val/accuracy=0.9700  val/loss=1.000e-05"


def test_the_last_state_is_shown_when_a_run_stops_early() -> None:
    stream = io.StringIO()
    progress = Progress(total_steps=1000, steps_per_epoch=500, first_step=99, stream=stream)
    progress.update(100, 0.2, ENTRY)
    progress.update(101, 0.202, {})
    progress.update(110, 0.22, ENTRY)
    progress.message("stopped by SIGTERM")
    progress.close()
    assert [line.split("  ")[0] for line in lines_of(stream)] == [
        "step 100/1000",
        "stopped by SIGTERM",
        "step 110/1000",
    ]


@pytest.mark.parametrize(
    ("per_step", "steps", "shown"),
    [(1.0, 59, "0:59"), (60.0, 59, "59:00"), (60.0, 125, "2h 05m"), (3600.0, 30, "1d 6h")],
)
def test_time_left_is_readable(per_step: float, steps: int, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, per_step])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    Progress(total_steps=steps + 1, steps_per_epoch=1, stream=stream).update(1, 1.0, ENTRY)
    assert lines_of(stream)[0].endswith(f"  {shown} left")


def test_numbers_are_readable_at_any_size() -> None:
    stream = io.StringIO()
    progress = Progress(total_steps=9, steps_per_epoch=1, stream=stream)
    values = {"a": 0.0, "b": 1e-4, "c": 0.5, "d": 123.45, "e": 12345.6, "f": 1e8, "g": float("nan"), "h": float("inf")}
    progress.evaluation(1, values)
    assert "a=0.0000  b=1.000e-04  c=0.5000  d=123.5  e=12,346  f=1.000e+08  g=nan  h=inf" in stream.getvalue()


SHOW = """
import sys
from trainer.progress import Progress, summary_table
progress = Progress(total_steps=1200, steps_per_epoch=400)
progress.message("going on from step-00000100")
for step in (10, 400, 1200):
    progress.update(step, step / 400, %r)
    progress.evaluation(step, {"val/accuracy": 0.97, "val/macro_f1": 0.9, "val/accuracy_top5": 0.999, "val/loss": 0.1})
print("a line of a library")
progress.close()
summary_table([("accuracy", "0.9700"), ("run directory", "/long/" * 20)], "quickstart")
"""


def test_a_terminal_shows_a_bar_that_fits() -> None:
    said = on_terminal(SHOW % ENTRY)
    text = CONTROL.sub("", said)
    assert "━" in text and "1200/1200" in text and "data wait 3%" in text and "1.23 GB" in text
    assert "going on from step-00000100" in text and "a line of a library" in text
    assert max(len(line) for line in text.splitlines() if "/long/" not in line) <= 80
    assert said.rindex("\x1b[?25h") > said.rindex("\x1b[?25l"), "the cursor is shown again"
    assert "val/accuracy_top5=0.9990" in text, "a metric is not torn from its value"


def test_the_closing_table_cuts_nothing() -> None:
    text = CONTROL.sub("", on_terminal(SHOW % ENTRY)).replace("\r\n", "")
    assert "run directory  " + "/long/" * 20 in text
    stream = io.StringIO()
    summary_table([("a", "1"), ("longer", "x" * 300)], "title", stream)
    assert lines_of(stream) == ["title", "  a       1", f"  longer  {'x' * 300}"]
    summary_table([], "empty", stream)
    assert lines_of(stream)[-1] == "empty"


def test_a_pipe_gets_the_output_although_a_terminal_shows_the_progress() -> None:
    code = f"""
import subprocess, sys
done = subprocess.run([sys.executable, "-c", {SHOW % ENTRY!r}], stdout=subprocess.PIPE, text=True)
assert done.stdout == "a line of a library\\n", repr(done.stdout)
"""
    assert "1200/1200" in on_terminal(code)


@pytest.mark.parametrize("prepare", ["os.environ['TERM'] = 'dumb'", "sys.stderr = open(os.devnull, 'w')"])
def test_rich_is_not_imported_without_a_real_terminal(prepare: str) -> None:
    code = f"import os, sys\n{prepare}\n{SHOW % ENTRY}\nassert 'rich' not in sys.modules"
    assert "\x1b" not in on_terminal(code)


def test_a_log_step_costs_microseconds() -> None:
    def cost(act: Callable[[int], None]) -> float:
        start = time.perf_counter()
        for step in range(1000):
            act(step)
        return (time.perf_counter() - start) / 1000

    with Progress(10**6, 100, stream=io.StringIO(), live=True) as live:
        assert min(cost(lambda step: live.update(step, 0.1, ENTRY)) for _ in range(5)) < 200e-6

"""Heartbeats: in place, readable at any moment, and there after the end of their process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from harness import environment as child_environment
from processes import wait_until

from trainer import health
from trainer.health import PHASES, Heartbeat

BEATING = """
import sys, time
from pathlib import Path
from trainer.health import Heartbeat
heart = Heartbeat(Path(sys.argv[1]), 3)
while True:
    for heart.step in range(1000):
        heart.beat("forward")
        heart.beat("exchange")
"""


def test_a_beat_is_seen_at_once_and_says_who_where_and_when(tmp_path: Path) -> None:
    assert health.read(tmp_path, 0) is None
    heart = Heartbeat(tmp_path, 0)
    first = health.read(tmp_path, 0)
    assert first is not None and (first.step, first.phase, first.pid) == (0, "set-up", os.getpid())
    for step, phase in enumerate(PHASES[1:]):
        heart.step = step
        heart.beat(phase)
        sign = health.read(tmp_path, 0)
        assert sign is not None and (sign.step, sign.phase) == (step, phase) and sign.at >= first.at
        assert not sign.is_gone
    assert sign.where.startswith(f"rank 0 (process {os.getpid()} on ")
    health.clear(tmp_path)
    assert health.read(tmp_path, 0) is None


def test_signs_are_whole_while_they_change_and_stay_after_sigkill(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", BEATING, str(tmp_path)], env=child_environment())
    try:
        wait_until(lambda: (sign := health.read(tmp_path, 3)) is not None and sign.phase != "set-up", "the first beat")
        signs = [health.read(tmp_path, 3) for _ in range(2000)]
        assert all(sign is not None and sign.phase in ("forward", "exchange") for sign in signs)
        assert len({sign.step for sign in signs if sign}) > 1, "they do change"
        assert not any(sign.is_gone for sign in signs if sign)
    finally:
        process.send_signal(signal.SIGKILL)
    # A zombie is gone, too: nobody has asked for it yet.
    last = wait_until(lambda: (sign := health.read(tmp_path, 3)) is not None and sign.is_gone and sign, "its end")
    assert last.pid == process.pid
    process.wait()


def test_who_is_behind_sorts_first(tmp_path: Path) -> None:
    for rank, (step, phase) in enumerate([(4, "exchange"), (4, "forward"), (3, "save"), (4, "backward")]):
        heart = Heartbeat(tmp_path, rank)
        heart.step = step
        heart.beat(phase)
    signs = [sign for rank in range(4) if (sign := health.read(tmp_path, rank)) is not None]
    assert [sign.rank for sign in sorted(signs, key=lambda sign: sign.place)] == [2, 1, 3, 0]


def test_what_is_no_sign_reads_as_none(tmp_path: Path) -> None:
    (tmp_path / "health").mkdir()
    for text in ("", "\n", "1 forward\nhost 1 2\n", "x forward 1.0\nhost 1 2\n", "1 forward 1.0\n"):
        (tmp_path / "health" / "rank-0").write_text(text)
        assert health.read(tmp_path, 0) is None

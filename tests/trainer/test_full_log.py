"""The disk that takes what a training prints is full: the run ends, says so where it can, and goes on later."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from disks import small_disk
from harness import environment, toy_config
from outcome import assert_same_bits, only_run, record, state
from processes import ForkServer

SECTIONS = {"checkpoint": {"every_steps": 2}, "train": {"max_epochs": 2, "ema_decay": 0.9}}


def test_a_full_log_ends_the_run_which_says_so_in_its_record_and_goes_on_later(
    tmp_path: Path, server: ForkServer
) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "64k"):
        cut(tmp_path, disk / "log")

    for arguments in (
        ["--resume", str(only_run(tmp_path, "cut"))],
        ["--config", str(toy_config(tmp_path, name="whole", **SECTIONS))],
    ):
        assert server.run("fit", *arguments, cwd=tmp_path).wait() == [0]
    assert_same_bits(only_run(tmp_path, "cut"), only_run(tmp_path, "whole"))


def cut(tmp_path: Path, file: Path) -> None:
    """A training whose log meets the end of its disk."""
    config = toy_config(tmp_path, name="cut", **SECTIONS)
    command = [sys.executable, "-m", "trainer", "fit", "--config", str(config)]
    # Room for the lines of the start and of the first step: that of the evaluation meets the end of it.
    with file.open("wb") as log:
        log.write(b"." * (64 * 1024 - 250 - len(str(tmp_path))))
        log.flush()
        done = subprocess.run(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=log)
    assert done.returncode == 1 and done.stdout == b""
    now = record(only_run(tmp_path, "cut"))
    assert now["status"] == "failed"
    assert "the log (what stderr goes to) can't be written: No space left on device" in now["exit_reason"]
    assert b"Traceback" not in file.read_bytes()
    state(only_run(tmp_path, "cut"))  # whole

"""The disk that takes what a training prints is full: the run ends, says so where it can, and goes on later."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import environment, toy_config
from outcome import assert_same_bits, only_run, record, state

from trainer.cli import main


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_log_ends_the_run_which_says_so_in_its_record_and_goes_on_later(
    tmp_path: Path, small_disk: Path
) -> None:
    sections = {"checkpoint": {"every_steps": 2}, "train": {"max_epochs": 2, "ema_decay": 0.9}}
    config = toy_config(tmp_path, name="cut", **sections)
    command = [sys.executable, "-m", "trainer", "fit", "--config", str(config)]
    # Room for the lines of the start and of the first step: that of the evaluation meets the end of it.
    with (small_disk / "log").open("wb") as log:
        log.write(b"." * (64 * 1024 - 250 - len(str(tmp_path))))
        log.flush()
        done = subprocess.run(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=log)
    assert done.returncode == 1 and done.stdout == b""
    now = record(only_run(tmp_path, "cut"))
    assert now["status"] == "failed"
    assert "the log (what stderr goes to) can't be written: No space left on device" in now["exit_reason"]
    assert b"Traceback" not in (small_disk / "log").read_bytes()
    state(only_run(tmp_path, "cut"))  # whole

    assert main(["fit", "--resume", str(only_run(tmp_path, "cut"))]) == 0
    assert main(["fit", "--config", str(toy_config(tmp_path, name="whole", **sections))]) == 0
    assert_same_bits(only_run(tmp_path, "cut"), only_run(tmp_path, "whole"))

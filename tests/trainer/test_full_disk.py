"""Disks that fill, fail or vanish: one line, exit 1, nothing lost that was there, and the same bits afterwards."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from disks import fill, free, read_only, small_disk
from harness import toy_config
from outcome import assert_same_bits, entries, only_run, record
from processes import ForkServer, Training, wait_until

from trainer import checkpoint

SECTIONS: dict[str, Any] = {
    "model": {"name": "toy.net", "dropout": 0.2, "width": 100},
    "data": {"delay": 0.004},
    "train": {"max_epochs": 10, "ema_decay": 0.9},
    "evaluate": {"every_epochs": None},
    "checkpoint": {"every_steps": 20, "keep": 3},
}
SOON = 30.0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> Path:
    """The undisturbed run of 100 steps."""
    folder = tmp_path_factory.mktemp("finished")
    training = server.run("fit", "--config", str(toy_config(folder, **SECTIONS)), cwd=folder)
    assert training.wait() == [0], training.log()
    return only_run(folder)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as folder:
        yield folder


def start(server: ForkServer, folder: Path, *overrides: str, processes: int = 1, **sections: Any) -> Training:
    config = toy_config(folder, **{**SECTIONS, **sections})
    return server.start("fit", "--config", str(config), *overrides, cwd=folder, processes=processes)


def reached(folder: Path, training: Training, step: int) -> Path:
    """The run directory, once this step is logged."""

    def is_logged() -> bool:
        assert None in training.poll(), training.log()
        logs = list(folder.glob("runs/toy/*/metrics.jsonl"))
        return bool(logs) and f'"step": {step},' in logs[0].read_text()

    wait_until(is_logged, f"step {step}")
    return only_run(folder)


def saved(folder: Path, training: Training, step: int) -> Path:
    """The run directory, once the checkpoint of this step is there."""
    run = reached(folder, training, step)
    wait_until(lambda: (run / "checkpoints" / checkpoint.folder_name(step)).is_dir(), f"checkpoint {step}")
    return run


def one_line(training: Training, rank: int = 0) -> str:
    (line,) = [text for text in training.log(rank).splitlines() if text.startswith("trainer: ")]
    assert "Traceback" not in training.log(rank)
    return line


def steps(run: Path) -> list[int]:
    """Steps of the whole checkpoints; nothing unfinished is left beside them."""
    assert not list((run / "checkpoints").glob(".unfinished*"))
    found = [checkpoint.read(path) for path in checkpoint.present(run / "checkpoints")]
    for one in found:
        checkpoint.verify(one)
    return [one.manifest.step for one in found]


def goes_on(server: ForkServer, run: Path, finished: Path, going_on_from: str) -> None:
    training = server.run("fit", "--resume", str(run), cwd=run)
    assert training.wait() == [0], training.log()
    assert going_on_from in training.log()
    assert_same_bits(run, finished)


def test_a_disk_that_is_full_for_a_checkpoint(disk: Path, server: ForkServer, finished: Path) -> None:
    training = start(server, disk)
    run = saved(disk, training, 20)
    filler = fill(disk, leave=150_000)  # room for the log, not for another checkpoint
    assert training.wait(SOON) == [1]
    line = one_line(training)
    assert f"checkpoint {run}/checkpoints/step-00000040 could not be written (No space left on device" in line, line
    assert line.endswith(f"the last whole one is step-00000020; free space, then: trainer fit --resume {run}")
    assert steps(run) == [20] and record(run)["status"] == "failed" and "No space left" in record(run)["exit_reason"]
    filler.unlink()
    goes_on(server, run, finished, "going on from step-00000020")


def test_a_disk_that_is_full_for_the_metrics_still_takes_the_record(
    disk: Path, server: ForkServer, finished: Path
) -> None:
    training = start(server, disk)
    run = saved(disk, training, 40)
    whole = entries(run)
    filler = fill(disk)
    assert training.wait(SOON) == [1]
    assert one_line(training) == (
        f"trainer: error: {run}/metrics.jsonl could not be written (No space left on device); free space, then: "
        f"trainer fit --resume {run}"
    )
    assert free(disk) <= 65536 and not (run / ".reserve").exists(), "the record took what was kept for it"
    assert record(run)["status"] == "failed" and "metrics.jsonl could not be written" in record(run)["exit_reason"]
    assert steps(run) == [20, 40]

    fill(disk)
    again = server.run("fit", "--resume", str(run), cwd=run)
    assert again.wait(SOON) == [1]
    assert "can't be written (No space left on device" in one_line(again) and "free space" in one_line(again)
    assert record(run)["status"] == "failed" and steps(run) == [20, 40]
    filler.unlink()
    goes_on(server, run, finished, "going on from step-00000040")
    assert entries(run)[: len(whole)] == whole
    assert (run / ".reserve").stat().st_size == 65536


def test_a_disk_that_is_full_from_the_start(disk: Path, server: ForkServer) -> None:
    config = toy_config(disk, **SECTIONS)
    (disk / "runs").mkdir()
    fill(disk)
    training = server.run("fit", "--config", str(config), cwd=disk)
    assert training.wait(SOON) == [1]
    assert f"{disk}/runs/toy can't be written (No space left on device" in one_line(training)
    assert not list(disk.glob("runs/*/*"))


def test_a_folder_that_turns_read_only(tmp_path: Path, server: ForkServer, finished: Path) -> None:
    training = start(server, tmp_path)
    run = saved(tmp_path, training, 20)
    with read_only(run / "checkpoints"):
        assert training.wait(SOON) == [1]
        line = one_line(training)
        assert "step-00000040 could not be written (Read-only file system" in line and "step-00000020" in line
        assert f"make the file system writable, then: trainer fit --resume {run}" in line
    assert steps(run) == [20]
    goes_on(server, run, finished, "going on from step-00000020")


def test_a_disk_that_refuses_for_another_reason(tmp_path: Path, server: ForkServer, finished: Path) -> None:
    """The system's limit for files stands for all that a disk may answer: EFBIG here."""
    training = start(server, tmp_path)
    run = saved(tmp_path, training, 20)
    resource.prlimit(training.pids[0], resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    assert training.wait(SOON) == [1]
    assert "step-00000040 could not be written (File too large" in one_line(training)
    assert steps(run) == [20]
    goes_on(server, run, finished, "going on from step-00000020")


@pytest.mark.parametrize("every", [20, 1000])
def test_a_run_directory_that_is_removed_is_noticed_with_the_next_save_or_before(
    every: int, tmp_path: Path, server: ForkServer
) -> None:
    training = start(server, tmp_path, f"checkpoint.every_steps={every}", "train.max_epochs=1000")
    run = reached(tmp_path, training, 25)
    shutil.rmtree(run)
    began = time.monotonic()
    assert training.wait(SOON) == [1]
    assert time.monotonic() - began < 10
    assert str(run) in one_line(training) and not run.exists(), "nor is half of it made anew"
    assert "put the" in one_line(training) or "start a new run" in one_line(training)


def test_a_run_directory_that_is_moved_is_noticed_and_can_be_put_back(
    tmp_path: Path, server: ForkServer, finished: Path
) -> None:
    training = start(server, tmp_path, "data.delay=0.02")
    run = saved(tmp_path, training, 20)
    run.rename(tmp_path / "moved")
    assert training.wait(SOON) == [1]
    line = one_line(training)  # of whichever was written first
    assert "metrics.jsonl could not be written (it was removed or replaced" in line or "checkpoints is gone" in line
    assert str(run) in line and "trainer fit --resume" in line
    (tmp_path / "moved").rename(run)
    goes_on(server, run, finished, "going on from step-00000020")


# Under ddp rank 1 writes nothing.
@pytest.mark.parametrize(
    ("strategy", "where"),
    [("ddp", "disk"), ("ddp", "rank 0"), ("fsdp", "disk"), ("fsdp", "rank 0"), ("fsdp", "rank 1")],
)
def test_a_save_that_fails_under_several_ranks_ends_all_of_them_and_is_told_once(
    strategy: str, where: str, disk: Path, server: ForkServer
) -> None:
    overrides = [f"strategy={strategy}", "data.batch_size=5", "train.max_epochs=5", "data.delay=0.002"]
    training = start(server, disk, *overrides, processes=2)
    run = saved(disk, training, 20)
    if where == "disk":
        fill(disk, leave=150_000)
    else:
        limits = (100_000, resource.RLIM_INFINITY)
        resource.prlimit(training.pids[int(where[-1])], resource.RLIMIT_FSIZE, limits)
    assert training.wait(SOON) == [1, 1]
    lines = [line for rank in (0, 1) for line in training.log(rank).splitlines() if line.startswith("trainer: ")]
    causes = [line for line in lines if "ended by the failure of rank" not in line]
    why = "No space left on device" if where == "disk" else "File too large"
    assert len(causes) == 1 and f"step-00000040 could not be written ({why}" in causes[0], lines
    assert "the last whole one is step-00000020" in causes[0]
    assert steps(run) == [20] and record(run)["status"] == "failed"
    if where == "disk":
        os.unlink(disk / "filler")
    more = server.run("fit", "--resume", str(run), cwd=run, processes=2)
    assert more.wait() == [0, 0], more.log()
    assert steps(run) == [20, 40, 50]


def test_a_signal_on_a_full_disk_ends_with_a_failure_not_as_preempted(
    disk: Path, server: ForkServer, finished: Path
) -> None:
    training = start(server, disk)
    run = saved(disk, training, 20)
    filler = fill(disk, leave=100_000)
    training.send(signal.SIGTERM)
    assert training.wait(SOON) == [1]
    assert "No space left on device" in one_line(training) and "step-00000020" in one_line(training)
    assert record(run)["status"] == "failed" and steps(run) == [20]
    filler.unlink()
    goes_on(server, run, finished, "going on from step-00000020")

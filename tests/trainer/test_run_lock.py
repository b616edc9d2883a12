"""Two jobs on one run directory: the second gets a line that names the first, and harms nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import environment, toy_config
from outcome import assert_same_bits, entries, only_run, record
from processes import ForkServer, wait_until

from trainer import health, run_lock
from trainer.environment import host
from trainer.errors import UserError
from trainer.health import Heartbeat
from trainer.load import load
from trainer.resume import begin
from trainer.run import Run, find_runs
from trainer.run_lock import LOCK, acquire

SECTIONS: dict[str, Any] = {"train": {"max_epochs": 1}, "checkpoint": {"every_steps": 2, "keep": 9}}
LONG = "data.delay=0.9"
"""10 steps that take longer than the second job's patience, which is that of real processes here."""

HOLD = """
import sys
from pathlib import Path
from trainer.run_lock import acquire
lock = acquire(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.readline()
lock.release()
print("released", flush=True)
sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "PATIENCE_SECONDS", 0.5)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `tmp_path`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path), "--note", "hello"]
    with subprocess.Popen(
        command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("trainer: ", "Traceback"))]


def test_the_line_names_who_holds_the_lock(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        acquire(tmp_path)
    assert str(caught.value).startswith(
        f"{tmp_path}: process {holder.pid} on {host()} is still working on this run, since 20"
    )
    written = json.loads((tmp_path / LOCK).read_text())
    assert written["pid"] == holder.pid and written["command"].endswith("--note hello")


def test_a_lock_goes_to_the_next_when_it_is_released_or_its_holder_is_killed(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert holder.stdin is not None and holder.stdout is not None
    holder.stdin.write("\n")
    holder.stdin.flush()
    assert holder.stdout.readline() == "released\n"
    lock = acquire(tmp_path)
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    with pytest.raises(UserError, match=f"process {os.getpid()} on"):
        acquire(tmp_path)
    lock.release()
    lock.release()
    acquire(tmp_path).release()


def test_a_killed_holder_is_waited_for(
    holder: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "PATIENCE_SECONDS", 30.0)
    threading.Timer(0.3, holder.kill).start()
    acquire(tmp_path).release()


def test_a_forked_child_holds_no_lock_and_does_not_free_it_either(tmp_path: Path) -> None:
    lock = acquire(tmp_path)
    read, write = os.pipe()
    if (pid := os.fork()) == 0:  # a data worker that outlives its parent's lock
        lock.release()
        os.read(read, 1)
        os._exit(0)
    with pytest.raises(UserError):
        acquire(tmp_path)
    os.close(os.open(tmp_path / LOCK, os.O_RDONLY))
    del lock  # forgotten without a release, as when its process dies
    acquire(tmp_path).release()
    os.write(write, b"x")
    assert os.waitpid(pid, 0)[1] == 0
    os.close(read)
    os.close(write)


ORPHAN = """
import ctypes, os, signal, sys
from pathlib import Path
from trainer.run_lock import acquire
lock = acquire(Path(sys.argv[1]))
libc = ctypes.CDLL(None)
if libc.fork() == 0:  # as a library in C forks: Python's own hooks don't run
    if libc.fork() == 0:
        print(os.getpid(), flush=True)
        signal.pause()
    os._exit(0)
os.wait()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="who has a file open is told by /proc")
def test_a_grandchild_that_keeps_the_lock_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ORPHAN, str(tmp_path)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        orphan = int(process.stdout.readline())
        assert process.wait(30) == -signal.SIGKILL
        with pytest.raises(UserError) as caught:
            acquire(tmp_path)
        assert f"process {process.pid}, which worked on this run since 20" in str(caught.value)
        assert f"is gone, but process {orphan} that it has left behind still holds the run" in str(caught.value)
        os.kill(orphan, signal.SIGKILL)
    acquire(tmp_path).release()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "x", "host": 1}', b"\xff"])
def test_a_lock_that_its_holder_could_not_sign_is_one_all_the_same(
    content: bytes, holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    (tmp_path / LOCK).write_bytes(content)
    with pytest.raises(UserError, match=r"another process is working on this run .*\.run\.lock is locked"):
        acquire(tmp_path)


def test_a_file_system_without_locks_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("trainer.files.fcntl.flock", refuse)
    first, second = acquire(tmp_path), acquire(tmp_path)
    first.release()
    second.release()


def test_a_second_job_on_a_run_is_refused_and_the_first_goes_on(tmp_path: Path, server: ForkServer) -> None:
    undisturbed = toy_config(tmp_path, name="undisturbed", **SECTIONS)
    reference = server.start("fit", "--config", str(undisturbed), cwd=tmp_path)
    first = server.start("fit", "--config", str(toy_config(tmp_path, **SECTIONS)), LONG, cwd=tmp_path)
    wait_until(lambda: any(tmp_path.glob("runs/toy/*/checkpoints/step-*")), "a checkpoint")
    run = only_run(tmp_path)
    Run(run).update(status="failed")  # only the lock tells
    second = server.run("fit", "--resume", str(run), cwd=tmp_path)
    assert second.wait() == [2]
    (line,) = lines(second.log())
    assert line.startswith(f"trainer: error: {run}: process {first.pids[0]} on {host()} is still working on this run")
    assert first.wait() == reference.wait() == [0]
    assert len(record(run)["attempts"]) == 1
    assert_same_bits(run, only_run(tmp_path, "undisturbed"))


@pytest.mark.parametrize("before", ["nothing", "a killed run"])
def test_auto_started_twice_at_once_is_one_run_and_one_line(before: str, tmp_path: Path, server: ForkServer) -> None:
    command = ["fit", "--config", str(toy_config(tmp_path, **SECTIONS)), "resume=auto", LONG]
    if before == "a killed run":
        killed = server.start(*command, cwd=tmp_path)
        wait_until(lambda: any(tmp_path.glob("runs/toy/*/checkpoints/step-*")), "a checkpoint")
        killed.kill()
    both = [server.start(*command, cwd=tmp_path) for _ in range(2)]
    codes = [training.wait()[0] for training in both]
    assert sorted(codes) == [0, 2], [training.log() for training in both]
    winner, loser = both[codes.index(0)], both[codes.index(2)]
    (line,) = lines(loser.log())
    assert f"process {winner.pids[0]} on {host()} is still working on this run" in line
    run = only_run(tmp_path)
    assert len(record(run)["attempts"]) == (1 if before == "nothing" else 2)
    assert [entry["step"] for entry in entries(run) if "train/loss" in entry] == list(range(1, 11))


class Elsewhere:
    """A run whose record says that it is at work on another host, and the signs of life of its two ranks."""

    def __init__(self, folder: Path) -> None:
        self.config = load(toy_config(folder))
        self.run = Run.create(self.config, 2, "points")
        self.run.update(host="another-node")
        self.hearts = [Heartbeat(self.run.path, rank) for rank in range(2)]
        self.told: list[str] = []

    def begin(self) -> Run:
        return begin(self.config, self.run, 1, "points", self.told.append)

    def age(self, seconds: float) -> None:
        for file in (self.run.path / health.FOLDER).iterdir():
            os.utime(file, (time.time() - seconds,) * 2)


def test_a_run_on_another_host_that_gives_signs_of_life_is_refused(tmp_path: Path) -> None:
    elsewhere = Elsewhere(tmp_path)
    stop = threading.Event()

    def live() -> None:
        while not stop.wait(0.2):
            elsewhere.hearts[1].step += 1
            elsewhere.hearts[1].beat("data")

    alive = threading.Thread(target=live)
    alive.start()
    try:
        with pytest.raises(
            UserError, match=r"another job is still working on this run \(rank 1 .*phase data, is alive"
        ):
            elsewhere.begin()
    finally:
        stop.set()
        alive.join()
    assert "waiting up to 60 s for a sign of life" in elsewhere.told[0]
    assert len(elsewhere.run.record["attempts"]) == 1
    acquire(elsewhere.run.path).release()


def test_a_run_on_another_host_whose_heart_stood_still_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = Elsewhere(tmp_path)
    elsewhere.age(run_lock.ALIVE_SECONDS + 1)
    run = elsewhere.begin()
    assert elsewhere.told == [] and run.lock is not None
    run.end_attempt("failed")
    elsewhere.run.update(status="running", host="another-node")
    monkeypatch.setattr(run_lock, "ALIVE_SECONDS", 1.0)
    for seconds in (0, -500):  # fresh; of a host whose clock is ahead
        elsewhere.age(seconds)
        began = time.monotonic()
        elsewhere.begin().end_attempt("failed")
        assert 0.8 < time.monotonic() - began < 10
        elsewhere.run.update(status="running", host="another-node")
    assert [attempt["status"] for attempt in elsewhere.run.record["attempts"]] == ["killed", *["failed"] * 3]


def test_what_fails_on_the_way_leaves_no_lock(tmp_path: Path) -> None:
    config = load(toy_config(tmp_path))
    run = Run.create(config, 1, "points")
    run.update(pid=1, process_started=None)
    with pytest.raises(UserError, match="process 1 on"):
        begin(config, run, 1, "points", pytest.fail)
    acquire(run.path).release()
    assert len(find_runs(tmp_path / "runs")) == 1

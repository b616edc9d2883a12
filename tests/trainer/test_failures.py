"""Whose failure it is: claimed once, however many ranks see it, and told from its consequences."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from processes import wait_until

from trainer import environment, failures
from trainer.errors import TrainerError, UserError
from trainer.failures import Failure
from trainer.health import Heartbeat
from trainer.world import World

LOST = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3542")


LAST_BEAT = """
import sys
from pathlib import Path
from trainer.health import Heartbeat
heart = Heartbeat(Path(sys.argv[1]), 1)
heart.step = 6
heart.beat("forward")
"""
CHILD = """
import signal, time
from trainer.environment import signal_at_parents_end
signal_at_parents_end(signal.SIGTERM)
print(1, flush=True)
time.sleep(100)
"""
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
"""


def place(rank: int, size: int = 2) -> World:
    return World(rank, size, rank, size, launched=True)


def test_of_many_ranks_that_fail_at_once_one_holds_the_claim(tmp_path: Path) -> None:
    ready, held = threading.Barrier(16), []

    def fail(rank: int) -> None:
        ready.wait()
        held.append(failures.claim(tmp_path, Failure(rank, f"cause {rank}")))

    threads = [threading.Thread(target=fail, args=(rank,)) for rank in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 16 and len(set(held)) == 1 and failures.first(tmp_path) == held[0]
    assert [file.name for file in tmp_path.iterdir()] == [".failure"]
    failures.clear(tmp_path)
    assert failures.first(tmp_path) is None


def test_a_broken_connection_is_the_consequence_of_what_another_rank_said(tmp_path: Path) -> None:
    cause, is_mine = failures.conclude(tmp_path, place(1), ValueError("the sky is falling"))
    assert is_mine and cause == Failure(1, "rank 1: ValueError: the sky is falling")
    assert failures.conclude(tmp_path, place(0), LOST) == (cause, False)


def test_a_broken_connection_to_a_process_that_is_gone_names_it(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", LAST_BEAT, str(tmp_path)], check=True)
    cause, is_mine = failures.conclude(tmp_path, place(0), LOST)
    assert is_mine and "step 7, phase forward: the process ended without a word" in cause.cause


def test_a_broken_connection_that_nobody_explains_is_told_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "WORD_SECONDS", 0.2)
    Heartbeat(tmp_path, 1)  # alive
    cause, is_mine = failures.conclude(tmp_path, place(0), LOST)
    assert is_mine and cause.cause.startswith("a connection to another rank broke: RuntimeError: [../gloo")


def test_an_error_that_all_ranks_have_is_left_to_rank_0(tmp_path: Path) -> None:
    error = UserError("too many bad samples")
    results = {}

    def other() -> None:
        results[1] = failures.conclude(tmp_path, place(1), error)

    thread = threading.Thread(target=other)
    thread.start()
    wait_until(thread.is_alive, "the other rank")
    results[0] = failures.conclude(tmp_path, place(0), error)
    thread.join()
    assert results[0] == (Failure(0, "rank 0: UserError: too many bad samples", 2), True)
    assert results[1] == (results[0][0], False)


@pytest.mark.parametrize(
    "error", [ValueError("socket"), TrainerError("connection closed"), RuntimeError("size mismatch")]
)
def test_what_is_no_broken_connection_is_this_ranks_own(error: Exception) -> None:
    assert not failures.is_lost_connection(error)


def test_what_a_broken_connection_looks_like() -> None:
    for error in (LOST, ConnectionResetError(), RuntimeError("NCCL error: remote process exited")):
        assert failures.is_lost_connection(error)


def test_a_full_disk_does_not_hide_the_failure(tmp_path: Path) -> None:
    mine = Failure(0, "no space left")
    assert failures.claim(tmp_path / "gone", mine) == mine


def test_a_process_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("the kernel of Linux does it")
    done = subprocess.run([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True, timeout=60)
    wait_until(lambda: not environment.alive(int(done.stdout), None), "the end of the child", 10)

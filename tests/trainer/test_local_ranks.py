"""Ranks on this machine: their world, their end, and that nothing of them is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import wait_until

from trainer import local_ranks

WITH_CHILD = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(os.environ.get("RANK"), child.pid, flush=True)
if sys.argv[1] == "end":
    sys.exit(3)
time.sleep(600)
"""


def lives(pid: int) -> bool:
    """Whether a process runs; one that is dead and not collected yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def child_of(ranks: local_ranks.LocalRanks, rank: int) -> int:
    wait_until(lambda: ranks.output(rank).endswith("\n"), "the child")
    return int(ranks.output(rank).split()[1])


def test_each_rank_finds_its_own_world_and_not_the_one_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "7")
    monkeypatch.setenv("GROUP_RANK", "5")
    code = "from trainer import world; import os; print(world.from_environment(), os.environ.get('GROUP_RANK'))"
    with local_ranks.start([sys.executable, "-c", code], 2, tmp_path / "two") as two:
        assert two.wait(30) == [0, 0]
    for rank in (0, 1):
        assert f"rank={rank}, size=2, local_rank={rank}, local_size=2" in two.output(rank)
        assert two.output(rank).endswith("None\n")
    with local_ranks.start([sys.executable, "-c", code], 1, tmp_path / "one") as one:
        assert one.wait(30) == [0]
    assert "rank=0, size=1" in one.output(0) and "launched=False" in one.output(0)


def test_kill_takes_the_children_of_the_ranks_with_it(tmp_path: Path) -> None:
    ranks = local_ranks.start([sys.executable, "-c", WITH_CHILD, "stay"], 2, tmp_path)
    children = [child_of(ranks, rank) for rank in (0, 1)]
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] still run"):
        ranks.wait(0.05)
    ranks.kill()
    assert ranks.poll() == [-signal.SIGKILL] * 2
    wait_until(lambda: not any(map(lives, [*children, *ranks.pids])), "the end of the children")


def test_a_rank_that_ended_leaves_no_child_behind(tmp_path: Path) -> None:
    with local_ranks.start([sys.executable, "-c", WITH_CHILD, "end"], 1, tmp_path) as ranks:
        child = child_of(ranks, 0)
        assert ranks.wait(30) == [3]
        wait_until(lambda: not lives(child), "the end of the child")


def test_a_signal_reaches_every_rank(tmp_path: Path) -> None:
    code = "import signal, time; print('up', flush=True); time.sleep(600)"
    with local_ranks.start([sys.executable, "-c", code], 2, tmp_path) as ranks:
        wait_until(lambda: all(ranks.output(rank) for rank in (0, 1)), "both")
        ranks.send(signal.SIGTERM)
        assert ranks.wait(30) == [-signal.SIGTERM] * 2


def test_ranks_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from trainer import local_ranks
ranks = local_ranks.start([sys.executable, "-c", "import time; time.sleep(600)"], 2, Path({str(tmp_path)!r}))
print(*ranks.pids, flush=True)
time.sleep(600)
"""
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    pids = [int(word) for word in starter.stdout.readline().split()]
    assert len(pids) == 2 and all(map(lives, pids))
    os.kill(starter.pid, signal.SIGKILL)
    starter.wait()
    starter.stdout.close()
    wait_until(lambda: not any(map(lives, pids)), "the end of the ranks")


def test_a_program_that_is_not_there_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        local_ranks.start([str(tmp_path / "missing")], 2, tmp_path)

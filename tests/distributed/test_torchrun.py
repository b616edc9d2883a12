"""Real torchrun: one agent, two agents, and an agent that is told to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import soak
from harness import environment, toy_config
from outcome import assert_same_bits, entries, losses, only_run, record
from processes import ForkServer, wait_until

from trainer import checkpoint
from trainer.cli import main
from trainer.local_ranks import free_port


def torchrun(folder: Path, log: str, options: Sequence[str], *args: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "trainer", *args]
    with (folder / log).open("wb") as file:
        return subprocess.Popen(
            command, cwd=folder, env=environment(), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def test_the_quickstart_runs_under_torchrun_as_it_stands(tmp_path: Path) -> None:
    overrides = ["train.max_steps=5", "tracking.enabled=false"]  # short; everything else as it stands
    arguments = ["fit", "--config", "quickstart.yaml", *overrides]
    agent = torchrun(tmp_path, "log", ["--standalone", "--nproc-per-node=2"], *arguments)
    assert agent.wait(100) == 0, (tmp_path / "log").read_text()
    run = only_run(tmp_path, "quickstart")
    assert record(run)["status"] == "finished" and record(run)["world_size"] == 2
    assert entries(run)[-1]["step"] == 5 and 0 < entries(run)[-1]["test/accuracy"] < 1
    text = (tmp_path / "log").read_text()
    assert text.count("run directory:") == 1 and "2 processes" in text  # one rank speaks


def test_two_nodes_and_one_of_them_told_to_stop(tmp_path: Path, server: ForkServer) -> None:
    slow = {"data": {"samples": 200, "batch_size": 10, "delay": 0.05, "workers": 1}}
    config = toy_config(tmp_path, **slow)
    options = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    options += ["--rdzv-id=two-nodes", "--local-addr=127.0.0.1"]
    agents = [torchrun(tmp_path, f"log{n}", options, "fit", "--config", str(config)) for n in (0, 1)]
    try:
        wait_until(lambda: list(tmp_path.glob("runs/*/*/metrics.jsonl")), "the first step")
        wait_until(lambda: len(losses(only_run(tmp_path))) >= 3, "three steps")
        agents[1].send_signal(signal.SIGTERM)
        for agent in agents:
            assert agent.wait(60) != 0  # torchrun has no code of its own for what its workers end with
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
    logs = [(tmp_path / f"log{n}").read_text() for n in (0, 1)]
    run = only_run(tmp_path)
    assert record(run)["status"] == "preempted" and record(run)["exit_reason"] == "SIGTERM", logs
    assert "preempted: stopped by SIGTERM at step" in "".join(logs)
    last = entries(run)[-1]["step"]
    assert 3 <= last < 20 and (run / "checkpoints" / f"step-{last:08d}").is_dir()

    assert main(["fit", "--resume", str(run), "data.batch_size=20"]) == 0
    assert [entry["step"] for entry in entries(run) if "train/loss" in entry] == list(range(1, 21))


STOPPED: dict[str, Any] = {
    "model": {"name": "toy.net", "dropout": 0.2},
    "data": {"samples": 203, "batch_size": 8, "workers": 1, "delay": 0.03},
    "train": {"max_epochs": soak.choose(8, 30), "ema_decay": 0.9},
    "checkpoint": {"every_steps": 10, "keep": 2},
}
WAYS = [
    ("agent", signal.SIGTERM),
    ("agent", signal.SIGUSR1),  # ends torchrun at once: its ranks notice that it is gone
    ("agent", signal.SIGKILL),
    ("rank", signal.SIGTERM),
    ("rank", signal.SIGUSR1),
]
"""Who gets which signal."""


@pytest.mark.soak
def test_whoever_is_told_to_stop_under_torchrun_all_ranks_end_with_75_and_a_checkpoint(
    tmp_path: Path, server: ForkServer, survived: Callable[[str], None]
) -> None:
    steady = toy_config(tmp_path, name="steady", **STOPPED)
    reference = server.start("fit", "--config", str(steady), cwd=tmp_path, processes=2)
    config = toy_config(tmp_path, name="stopped", **STOPPED)
    draw = soak.draw()
    rounds = soak.choose(1, 4)
    for number, (who, what) in enumerate(WAYS * rounds):
        options = ["--standalone", "--nproc-per-node=2"]
        agent = torchrun(tmp_path, f"log{number}", options, "fit", "--config", str(config), "resume=auto")
        log = tmp_path / f"log{number}"
        wait_until(lambda log=log: "step " in log.read_text(), "the first step")
        pause = time.monotonic() + draw.random() * 0.5
        wait_until(lambda p=pause: time.monotonic() > p, "a random moment")
        family = psutil.Process(agent.pid).children(recursive=True)
        ranks = [one for one in family if one.ppid() == agent.pid]
        (agent if who == "agent" else draw.choice(ranks)).send_signal(what)
        agent.wait(60)
        wait_until(lambda f=family: not any(one.is_running() and one.status() != "zombie" for one in f), "all to end")
        text = log.read_text()
        run = only_run(tmp_path, "stopped")
        now = record(run)
        expected = what.name if who == "rank" else "SIGTERM"
        assert (now["status"], now["exit_reason"]) == ("preempted", expected), text
        if who == "rank":
            assert "exitcode  : 75" in text and "exitcode  : 1 " not in text
        assert text.count("trainer: preempted: stopped by") == 1 and "failed" not in told(text)
        damaged: list[str] = []
        found = checkpoint.newest_whole(run / "checkpoints", damaged.append)
        assert found is not None and not damaged and found.manifest.step == entries(run)[-1]["step"]
        assert not list((run / "checkpoints").glob(".*"))
    last = server.run("fit", "--resume", str(only_run(tmp_path, "stopped")), cwd=tmp_path, processes=2)
    assert last.wait() == reference.wait() == [0, 0], last.log()
    assert_same_bits(only_run(tmp_path, "stopped"), only_run(tmp_path, "steady"))
    survived(
        f"{len(WAYS) * rounds} signals under torchrun, to the agent or to a rank: exit 75, whole checkpoint, same bits"
    )


def told(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.startswith("trainer: "))


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_the_cause_comes_first_on_the_terminal(how: str, tmp_path: Path) -> None:
    config = toy_config(tmp_path, recipe={"name": "toy.failing_recipe", "rank": 1, "how": how})
    agent = torchrun(tmp_path, "log", ["--standalone", "--nproc-per-node=2"], "fit", "--config", str(config))
    assert agent.wait(100) != 0
    text = (tmp_path / "log").read_text()
    lines = told(text).splitlines()
    cause = "the sky is falling" if how == "raise" else "the process ended without a word"
    assert cause in lines[0] and "".join(lines).count(cause) == 1, text
    assert record(only_run(tmp_path))["status"] == "failed"
    before = text[: text.index(lines[0])]
    assert "Error" not in before and "Traceback" not in before, text

"""Real torchrun: one agent, two agents, and an agent that is told to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from harness import environment, free_port, toy_config
from outcome import entries, losses, only_run, record
from processes import ForkServer, wait_until

from trainer.cli import main


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

"""Trials of `benchmarks/tune_overhead.py` under `trainer tune`: `tune_ours.py BASE.yaml TRIALS OUT.json [--empty]`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = "workloads.tune_ours"


def nothing_to_load(setup: dict[str, Any]) -> None:
    """What a host does before it takes trials that do nothing."""


def nothing(order: dict[str, Any], channel: Any) -> int:
    """A trial that does nothing: one report, and the end."""
    run = f"{order['trials_dir']}/{order['name']}/run"
    channel.send({"event": "started", "run": run, "iterations": 1})
    value = {"val/accuracy": float(order["number"])}
    report = {"iteration": 1, "step": 1, "epoch": 1.0, "metrics": value, "seconds": 0.0, "is_last": True}
    channel.send({"event": "report", **report})
    channel.recv()
    channel.send({"event": "ended", "status": "finished", "metrics": value, "seconds": {"train": 0.0}, "run": run})
    return 0


def empty(base: str, trials: int) -> None:
    """As the command does it, with other trials."""
    from trainer.load import load
    from trainer.preemption import Preemption
    from trainer.progress import print_line
    from trainer.search.folder import SearchFolder
    from trainer.search.session import Plan, conduct

    config = load(base, [f"tune.num_samples={trials}", "tune.sampler=random", "runs_dir=runs-empty"])
    with Preemption() as wish:
        folder = SearchFolder.create(config)
        conduct(config, folder, Plan(target=f"{HERE}:nothing", warm=f"{HERE}:nothing_to_load"), wish, print_line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("trials", type=int)
    parser.add_argument("out", type=Path)
    parser.add_argument("--empty", action="store_true")
    arguments = parser.parse_args()
    if arguments.empty:
        empty(arguments.base, arguments.trials)
        arguments.out.write_text(json.dumps({"training": 0.0}))
        return
    from trainer.cli import main as trainer

    runs = Path(f"runs-{arguments.out.stem}")
    code = trainer(
        ["tune", "--config", arguments.base, "--num-samples", str(arguments.trials), "--json", f"runs_dir={runs}"]
    )
    if code:
        sys.exit(code)
    newest = max(runs.glob("overhead/tune-*"), key=lambda path: path.stat().st_mtime)
    entries = [json.loads(line) for line in (newest / "trials.jsonl").read_text().splitlines()]
    assert len(entries) == arguments.trials and all(entry["state"] == "finished" for entry in entries)
    seconds = sum(entry["seconds"]["train"] + entry["seconds"]["evaluate"] for entry in entries)
    arguments.out.write_text(json.dumps({"training": seconds}))


if __name__ == "__main__":
    main()

"""`trainer finetune-lora` as a contender: the config of a `Work`, the command, and what the run directory tells."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from workloads.lora import Work

Method = Literal["full", "lora", "qlora"]
TOKENS = "tokens"
"""Key of `metrics.jsonl`: tokens of training text so far, padding not counted."""


@dataclass(frozen=True)
class Timed:
    """The steps after the warm-up."""

    steps: int
    tokens: float
    seconds: float

    @property
    def speed(self) -> float:
        """Tokens of training text per second."""
        return self.tokens / self.seconds


def command(work: Work, folder: Path, method: Method = "lora") -> list[str]:
    """The command line of a training into `folder`. Nothing is evaluated or saved while the clock runs, as with the
    peers."""
    file = folder / "config.json"
    file.write_text(json.dumps(config(work, folder, method), indent=2))
    verb = "fit" if method == "full" else "finetune-lora"
    return [sys.executable, "-m", "trainer", verb, "--config", str(file)]


def config(work: Work, folder: Path, method: Method) -> dict[str, Any]:
    """All that the benchmarks ask of the recipe stands here."""
    adapter = {
        "name": method,
        "r": work.r,
        "alpha": work.alpha,
        "dropout": 0.0,
        "target_modules": list(work.target_modules),
    }
    return {
        "name": "lora-benchmark",
        "recipe": {"name": "language_modeling", "max_length": work.max_length, "packing": "packed"},
        "seed": work.seed,
        "init_from": work.folder,
        "model": {"name": "causal_lm"},
        **({} if method == "full" else {"adapter": adapter}),
        "data": {"name": "instructions", "path": work.train, "val_fraction": 0.0, "batch_size": 1},
        "optimizer": {"name": "adamw", "lr": work.lr, "weight_decay": 0.0},
        "schedule": {"name": "constant"},
        "train": {
            "max_epochs": 1,
            "max_steps": work.max_steps,
            "precision": work.precision,
            "accumulate": work.packs_per_step,
            "clip_norm": work.clip_norm,
            "log_every": 1,
        },
        "evaluate": {"every_epochs": None, "test": False},
        "checkpoint": {"every_minutes": None},
        "tracking": {"enabled": False},
        "runs_dir": str(folder / "runs"),
    }


def run_directory(folder: Path) -> Path:
    """Of the one run that was written into `folder`."""
    (record,) = folder.glob("runs/*/*/run.json")
    return record.parent


def adapter(folder: Path) -> Path:
    """The adapter in PEFT's format."""
    return run_directory(folder) / "adapter"


def timed(folder: Path, work: Work, tokens_of_epoch: int) -> Timed:
    """From the end of the warm-up to the last step, by the log.

    Where the log has no count of tokens, it is taken from the part of the epoch that these steps trained on: packed
    sequences are about equally full.
    """
    steps = [entry for entry in _log(run_directory(folder)) if "train/loss" in entry]
    first, last = steps[work.warmup_steps - 1], steps[-1]
    share = last["epoch"] - first["epoch"]
    tokens = last[TOKENS] - first[TOKENS] if TOKENS in last else tokens_of_epoch * share
    return Timed(last["step"] - first["step"], tokens, last["time"] - first["time"])


def _log(run: Path) -> Iterator[dict[str, Any]]:
    for line in (run / "metrics.jsonl").read_text().splitlines():
        yield json.loads(line)

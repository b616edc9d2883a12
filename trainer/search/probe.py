"""How long a trial takes, from a few of its steps: `python -m trainer.search.probe CONFIG FOLDER`.

Prints one JSON object on stdout. Trains the config's first steps in FOLDER and evaluates once; nothing of it is kept.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from trainer.assembly import build_data, build_task
from trainer.config import RunConfig
from trainer.fit import fit, make_plan
from trainer.load import load
from trainer.loop import Job
from trainer.run import Run
from trainer.world import World

STEPS = 20
"""Optimizer steps: the first few are slower and count less in a median."""


def probe(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Of a whole trial `steps` and `evaluations`; `step_seconds` and `evaluation_seconds` of one of them."""
    data = build_data(config)
    train_set = build_task(config, data).data.split("train")
    assert train_set is not None
    plan = make_plan(config, len(train_set), 1)
    steps = plan.length(0, 0, config.train).steps
    short = replace(
        config,
        train=replace(config.train, max_steps=min(STEPS, steps), log_every=1),
        checkpoint=replace(config.checkpoint, monitor=None),
        tracking=replace(config.tracking, enabled=False),
        evaluate=replace(config.evaluate, test=False, at_start=False, pictures=False),
        runs_dir=str(folder),
        resume="never",
    )
    spent: list[float] = []

    def listen(job: Job) -> None:
        whole = job.report.evaluate

        def timed(of: Job) -> dict[str, float]:
            began = time.perf_counter()
            try:
                return whole(of)
            finally:
                spent.append(time.perf_counter() - began)

        job.report.evaluate = timed  # type: ignore[method-assign, assignment]

    done = fit(short, None, World(), lambda text: None, prepare=listen)
    assert done is not None
    times = [entry["time"] for entry in Run(done.run).read_metrics() if "train/loss" in entry]
    between = [later - earlier for earlier, later in pairwise(times)]
    when = config.evaluate
    every = when.every_steps or (when.every_epochs * plan.steps_per_epoch if when.every_epochs else None)
    return {
        "steps": steps,
        "step_seconds": statistics.median(between) if between else 0.0,
        "evaluations": -(-steps // every) if every else 1,
        "evaluation_seconds": spent[-1] if spent else 0.0,
    }


if __name__ == "__main__":
    print(json.dumps(probe(load(sys.argv[1]), Path(sys.argv[2]))))

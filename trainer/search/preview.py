"""A look before spending: the space, its size, how many trials run at once, and what the search will cost."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import TrainerError
from trainer.progress import duration
from trainer.search import cluster
from trainer.search.cluster import Need
from trainer.search.rules import objectives_of
from trainer.search.space import Space, read_space

if TYPE_CHECKING:
    from trainer.config import RunConfig

FULL_COST = 200
"""Trials of more evaluations than this are simulated as having this many: the share that is spent is the same."""
SIMULATED_TRIALS = 200


@dataclass(frozen=True)
class Preview:
    """What `--dry-run` shows."""

    lines: list[str]
    facts: dict[str, Any]


def preview(config: RunConfig, address: str | None, say: Callable[[str], None]) -> Preview:
    """Look at the space and the resources, train the first steps of the config to know what a step takes.

    Raises UserError where no node can run a trial.
    """
    space = read_space(config.tune.space)
    need = Need(config.tune.cpus_per_trial, config.tune.gpus_per_trial)
    with cluster.connected(address):
        found = cluster.nodes()
        places = cluster.places(found, need)
    at_once = min(places, config.tune.num_samples, config.tune.max_concurrent or places)
    say("training the first steps of the config, to know how long a trial takes ...")
    probed = _probe(config)
    cost = estimate(config, space, probed, at_once)
    facts = {
        "space": {p.key: {"range": p.describe(), "when": {key: list(values) for key, values in p.when}} for p in space},
        "size": space.size(),
        "objective": objectives_of(config),
        "sampler": config.tune.sampler.name,
        "scheduler": config.tune.scheduler.name,
        "num_samples": config.tune.num_samples,
        "nodes": [vars(node) for node in found],
        "at_once": at_once,
        **cost,
    }
    return Preview(_lines(config, space, facts), facts)


def estimate(config: RunConfig, space: Space, probed: Mapping[str, Any], at_once: int) -> dict[str, Any]:
    """Trial-seconds of the whole search: without a scheduler, and as this one is likely to spend.

    The scheduler is run against trials of random quality whose order never changes between evaluations, which is when
    it stops the most it ever will at its settings.
    """
    folds = config.holdout.folds if config.tune.cross_validate else 1
    evaluations = folds if config.tune.cross_validate else max(1, probed["evaluations"])
    one = folds * (
        probed["steps"] * probed["step_seconds"] + max(1, probed["evaluations"]) * probed["evaluation_seconds"]
    )
    share = _share_spent(config, space, evaluations, at_once)
    most = one * config.tune.num_samples
    return {
        "trial_seconds": one,
        "evaluations": evaluations,
        "search_trial_seconds": {"most": most, "expected": share * most},
        "share": share,
        "wall_seconds": share * most / at_once,
    }


def _share_spent(config: RunConfig, space: Space, evaluations: int, at_once: int) -> float:
    """Part of the evaluations that are paid for, by a search of as many trials against random ones."""
    from trainer.search.simulate import simulate

    if config.tune.scheduler.name == "none":
        return 1.0
    length = min(evaluations, FULL_COST)
    trials = min(config.tune.num_samples, SIMULATED_TRIALS)
    tune = replace(config.tune, num_samples=trials, sampler=replace(config.tune.sampler, name="random", options={}))
    draw = random.Random(0)
    metric, mode = next(iter(objectives_of(config).items()))
    sign = 1.0 if mode == "max" else -1.0

    def curve(params: Mapping[str, Any]) -> list[tuple[Mapping[str, float], float]]:
        quality = sign * draw.random()
        return [({metric: quality + sign * number}, 1.0) for number in range(length)]

    train, when = config.train, config.evaluate
    plain = replace(
        config,
        tune=tune,
        train=replace(train, max_epochs=length, max_steps=None),
        evaluate=replace(when, every_epochs=1, every_steps=None),
    )
    done = simulate(plain, space, curve, at_once)
    return done.busy / (length * trials)


def _probe(config: RunConfig) -> dict[str, Any]:
    """What a few steps took, in a process of its own."""
    from trainer.load import dump

    with tempfile.TemporaryDirectory(prefix="trainer-probe-") as folder:
        path = Path(folder, "config.yaml")
        path.write_text(dump(replace(config, tune=type(config.tune)())))
        threads = max(1, math.floor(config.tune.cpus_per_trial))
        command = [sys.executable, "-m", "trainer.search.probe", str(path), folder]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it printed nothing")
            raise TrainerError(f"the config can't be trained: {last}; look with: trainer fit --config ...")
        probed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return probed


def _lines(config: RunConfig, space: Space, facts: Mapping[str, Any]) -> list[str]:
    width = max(len(parameter.key) for parameter in space)
    lines = ["space"]
    for parameter in space:
        when = " and ".join(f"{key} is {' or '.join(map(str, values))}" for key, values in parameter.when)
        lines.append(f"  {parameter.key:<{width}}  {parameter.describe()}{f'  when {when}' if when else ''}")
    size = facts["size"]
    num = facts["num_samples"]
    objective = ", ".join(f"{metric} ({mode})" for metric, mode in facts["objective"].items())
    cost = facts["search_trial_seconds"]
    nodes = ", ".join(f"{n['name']}: {n['cpus']:g} CPUs, {n['gpus']:g} GPUs" for n in facts["nodes"])
    folds = f", each of {config.holdout.folds} folds" if config.tune.cross_validate else ""
    lines += [
        f"size        {'no end: a number is continuous' if size is None else f'{size:,} different trials'}",
        f"objective   {objective}",
        f"search      {num} trials{folds}; sampler {facts['sampler']}, scheduler {facts['scheduler']}",
        f"at once     {facts['at_once']} ({nodes})",
        f"one trial   {duration(facts['trial_seconds'])}, {facts['evaluations']} evaluations",
        f"the search  {duration(cost['expected'])} of trials ({facts['share']:.0%} of {duration(cost['most'])}), "
        f"about {duration(facts['wall_seconds'])} on the clock",
    ]
    return lines

"""What a forked process does for one training of a trial: find its run, train it, report, say how it ended. No torch.

Only rank 0 talks, in events that are plain data: `started` once, `report` after each evaluation (then it waits for the
verdict), `ended` last, whatever happened.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.branching import branch, source
from trainer.config import RunConfig, Tune
from trainer.errors import Preempted, TrainerError
from trainer.files import leave_to_the_system
from trainer.load import load
from trainer.preemption import Preemption
from trainer.progress import print_line
from trainer.resume import belongs
from trainer.run import DAMAGED, FINISHED, STOPPED, Run, find_runs
from trainer.search.telling import Channel, Telling
from trainer.world import World, from_environment

FOR_A_TRIAL = (
    "tracking.enabled=false",
    "evaluate.test=false",
    "evaluate.at_start=false",
    "evaluate.pictures=false",
    "resume=never",
)
"""Overrides: what a trial does not need, the `test` split least of all: nothing is chosen by it."""


def run_trial(order: Mapping[str, Any], channel: Channel) -> int:
    """Train one trial, or one fold of it, and tell how it goes; returns the exit code and never raises.

    `order`: `config` (path), `overrides` (of the trial), `name` and `trials_dir` (the run is made in
    `<trials_dir>/<name>/`); optional are `more` (overrides that come last), `fold`, `threads`, `source` (`run` and
    `step`: begin with that run's checkpoint) and `reported`: how many evaluations the other side knows already, so that
    they are not sent again.
    The ranks of a trial are told who they are by the environment, as torchrun does it.

    For a process that was forked for this, and ends with `os._exit(code)`: to take the interpreter down would take
    longer than a small trial.
    """
    telling = Telling(channel, order.get("reported") or 0)
    try:
        # From here on a signal is a wish to stop: it is answered with a checkpoint after the first step.
        with Preemption() as wish:
            wish.take_interrupts()
            leave_to_the_system()
            return _train(order, telling, wish)
    except Preempted as error:
        return telling.paused(error)
    except BaseException as error:  # whatever it is, it is this trial's end and not that of its host
        return telling.failed(error)


def trial_config(order: Mapping[str, Any]) -> RunConfig:
    """The config that a trial trains: the base, the trial's own values, and what is asked of every trial."""
    overrides = [*order["overrides"], *FOR_A_TRIAL]
    overrides += [f"train.threads={order['threads']}"] if order.get("threads") is not None else []
    overrides += [f"holdout.fold={order['fold']}"] if order.get("fold") is not None else []
    # Without its space: every value that a space may take is tried when a config is loaded.
    overrides += ["tune.space={}", "tune.cross_validate=false", *order.get("more", ())]
    config = load(order["config"], overrides)
    changed: dict[str, Any] = {"name": order["name"], "runs_dir": str(order["trials_dir"])}
    if "answers" in config.recipe.options:  # they are generated after the last step, when nothing is judged any more
        changed["recipe"] = replace(config.recipe, options={**config.recipe.options, "answers": 0})
    changed["tune"] = Tune()
    return replace(config, **changed)


def _train(order: Mapping[str, Any], telling: Telling, wish: Preemption) -> int:
    world = from_environment()
    telling.is_main = world.is_main
    config = trial_config(order)
    donor = order.get("source")
    begun = _begun(config, source(Path(donor["run"]), donor["step"]) if donor else None)
    if begun is not None and begun.status in (FINISHED, STOPPED):  # whoever was told of it is gone
        return telling.known(begun)
    if begun is None and donor and world.is_main:
        begun = _branched(config, donor, world)

    from trainer.fit import fit

    def tell(error: BaseException) -> None:
        if isinstance(error, TrainerError):
            print_line(f"trainer: error: {error}")
        else:
            traceback.print_exception(error, file=sys.stderr)

    def say(text: str) -> None:
        if world.is_main:
            print_line(text)

    telling.inherited = donor["step"] if donor else 0
    return telling.ended(fit(config, begun, world, say, wish, tell, telling.prepare))


def _begun(config: RunConfig, began_with: Mapping[str, Any] | None) -> Run | None:
    """The newest run of this trial with these values and this beginning."""
    for run in find_runs(config.runs_dir, config.name):
        if run.status != DAMAGED and run.record.get("source") == began_with and belongs(run, config):
            return run
    return None


def _branched(config: RunConfig, donor: Mapping[str, Any], world: World) -> Run:
    from trainer.assembly import build_data

    fingerprint = build_data(config).fingerprint
    return branch(Run.open(donor["run"]), donor["step"], config, world.size, fingerprint)

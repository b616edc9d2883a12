"""When a training is killed: moments spread over its steps, evaluations and saves, and the wait for each. No torch."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from trainer import checkpoint, health
from trainer.health import Sign
from trainer.local_ranks import LocalRanks
from trainer.run import Run, find_runs

Phase = Literal["training", "evaluation", "saving"]
SETTING_UP = "set-up"
EVALUATION = ("evaluate", "test")
POLL_SECONDS = 0.0005
START_POLL_SECONDS = 0.01
SAVING_SECONDS = 0.01
"""Within which a kill follows the first sight of a checkpoint that is being written."""


@dataclass(frozen=True)
class Course:
    """How an undisturbed training went."""

    steps: int
    evaluations: list[int]
    """Steps after which the `val` or the `test` split was evaluated."""
    saves: list[int]
    step_seconds: float
    """Median from one logged step to the next."""
    evaluation_seconds: float


@dataclass(frozen=True)
class Moment:
    """When to kill: at the first sight of a phase in or after a step, and a little later."""

    phase: Phase
    step: int
    delay: float
    """Seconds."""


@dataclass(frozen=True)
class Hit:
    """What a kill met."""

    number: int
    wanted: Phase
    step: int
    """The step that rank 0 was in."""
    phase: str
    """What rank 0 did, see `health.PHASES`."""
    writing: bool
    """A checkpoint was being written beside it."""
    saved: int
    """Step of the newest checkpoint; 0 where there is none: there the next attempt begins."""

    @property
    def met(self) -> list[Phase]:
        """The kinds of moment that it was: a checkpoint is written beside what follows it."""
        if self.phase == "save":
            return ["saving"]
        at_work: Phase = "evaluation" if self.phase in EVALUATION else "training"
        return [at_work, "saving"] if self.writing else [at_work]


def course(run: Run) -> Course:
    """Read how a finished run went from its metrics and checkpoints."""
    entries = list(run.read_metrics())
    pairs = list(pairwise(entries))
    steps = [second["time"] - first["time"] for first, second in pairs if _is_step(first) and _is_step(second)]
    evaluations = [(second["time"] - first["time"], second["step"]) for first, second in pairs if not _is_step(second)]
    return Course(
        steps=max((entry["step"] for entry in entries), default=0),
        evaluations=sorted({step for _, step in evaluations}),
        saves=[checkpoint.step_of(path) for path in checkpoint.present(run.checkpoints)],
        step_seconds=statistics.median(steps) if steps else 0.0,
        evaluation_seconds=statistics.median(seconds for seconds, _ in evaluations) if evaluations else 0.0,
    )


def moments(of: Course, count: int, draw: random.Random) -> list[Moment]:
    """As many moments, one after the other, spread over the whole training, the phases as even as can be."""
    kinds: list[Phase] = ["training", "saving", "evaluation"] if of.evaluations else ["training", "saving"]
    phases = [kinds[number % len(kinds)] for number in range(count)]
    draw.shuffle(phases)
    chosen = []
    for number, phase in enumerate(phases):
        place = (number + draw.random()) / count * (of.steps - 1)
        if number == count - 1:  # whatever the others met, one attempt goes on from a checkpoint
            place = max(place, of.saves[0] + 1)
        if phase == "training":
            chosen.append(Moment(phase, min(int(place), of.steps - 1), draw.random() * of.step_seconds))
            continue
        steps = of.evaluations if phase == "evaluation" else of.saves
        seconds = of.evaluation_seconds if phase == "evaluation" else SAVING_SECONDS
        step = next((step for step in steps if step >= place), steps[-1])
        chosen.append(Moment(phase, step, draw.random() * seconds / 2))
    return chosen


def wait_for(moment: Moment, ranks: LocalRanks, runs_dir: Path, name: str) -> bool:
    """Return when the moment is there; False where the training ended before."""
    run = None
    while None in ranks.poll():
        if run is None:
            run = the_run(runs_dir, name)
        sign = health.read(run.path, 0) if run is not None else None
        # That of the attempt before is still there until this one sets itself up.
        if run is None or sign is None or sign.pid != ranks.pids[0] or sign.phase == SETTING_UP:
            time.sleep(START_POLL_SECONDS)
        elif _is_there(moment, sign, run):
            time.sleep(moment.delay)
            return None in ranks.poll()
        else:
            time.sleep(POLL_SECONDS)
    return False


def hit(number: int, moment: Moment, runs_dir: Path, name: str) -> Hit:
    """What a kill met, read from what the killed training has left."""
    run = the_run(runs_dir, name)
    assert run is not None
    sign = health.read(run.path, 0)
    assert sign is not None
    saved = [checkpoint.step_of(path) for path in checkpoint.present(run.checkpoints)]
    return Hit(number, moment.phase, sign.step + 1, sign.phase, _is_writing(run), saved[-1] if saved else 0)


def the_run(runs_dir: Path, name: str) -> Run | None:
    """The one run in a folder; None before it is there."""
    return next(iter(find_runs(runs_dir, name)), None)


def _is_there(moment: Moment, sign: Sign, run: Run) -> bool:
    # `sign.step` counts the steps that were done when the current one began.
    if moment.phase == "saving":
        return sign.step + 1 >= moment.step and _is_writing(run)
    if moment.phase == "evaluation":
        return sign.step + 1 >= moment.step and sign.phase in EVALUATION
    return sign.step >= moment.step and sign.phase not in (*EVALUATION, "save", "end")


def _is_writing(run: Run) -> bool:
    return any(run.checkpoints.glob(".unfinished-step-*"))


def _is_step(entry: dict[str, Any]) -> bool:
    return "train/loss" in entry

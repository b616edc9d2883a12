"""`trainer verify --resume`: is a run that was killed again and again the same, to the last bit? No torch at import.

Two trainings of the same config, one undisturbed, one killed at random moments and resumed, then all they have kept is
compared. Where it differs, one step is trained twice more, once after a resume and once without, and listened to.
"""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer import checkpoint
from trainer.config import RunConfig
from trainer.errors import EXIT_DONE, TrainerError
from trainer.load import dump, load
from trainer.local_ranks import LocalRanks
from trainer.run import FINISHED, Run
from trainer.verify import (
    Launch,
    Order,
    Say,
    finish,
    fit_arguments,
    only_run,
    own_words,
    require_done,
    run_probe,
)
from trainer.verify.moments import Hit, Moment, course, hit, moments, wait_for

if TYPE_CHECKING:
    from trainer.verify.compare_runs import Comparison
    from trainer.verify.compare_steps import Place

STEPS = 24
KILLS = 6
SAVES, EVALUATIONS = 8, 4
"""How often to save and to evaluate, where the config would do it less."""
ONE_PROCESS = ("auto", "single")
"""Strategies that run in one process."""
UNDISTURBED, KILLED = "undisturbed", "killed"
_DRAW = "draw from trainer.task.sample_seed(seed, epoch, index)"
HINTS = {
    "loss scale": "the loss scaler left out another step: its state was not restored",
    "weights before": "the update of the step before made them differ: an optimizer that keeps state outside of its "
    "`state`, or a model that changes its weights by itself",
    "random state": "something draws from it that a resumed run does not draw again, or draws once more: while the "
    "data or the model are built, in an evaluation, or in a thread",
    "samples": "the samples of the step are not the same: the data set has another length after a resume",
    "batch": "the data set draws from a random generator that no checkpoint holds, its own or that of a data worker, "
    f"or keeps other state from batch to batch: {_DRAW} instead",
    "input": "the task prepares the batch with state of its own, or draws from a generator that no checkpoint holds",
    "module": "its input and the saved weights are the same, so it keeps state that is not in its state_dict (a tensor "
    "or number as plain attribute, a buffer with persistent=False): register it as a buffer",
    "loss": "what the model gives is the same, so the task keeps state from step to step that no checkpoint holds",
    "gradient": "the loss is the same, so kernels that add in any order are the usual cause: "
    "set train.deterministic=true, and set CUBLAS_WORKSPACE_CONFIG=:4096:8",
    "weights after": "the gradients are the same, so the optimizer keeps state outside of its `state`, or the schedule "
    "is no function of the step",
}
"""Where a difference begins -> what usually causes it."""
NOT_REPRODUCIBLE = (
    "the training gives other numbers each time, killed or not: train.deterministic=false, or code that reads the "
    "clock, the environment, or a generator seeded from them"
)
IN_EVALUATION = (
    "all weights and states are the same, so the evaluation itself draws random numbers or keeps state from one to the "
    f"next: {_DRAW}, and make metrics anew in `metrics()`"
)
NOT_AGAIN = "the step gave the same bits when it was trained again: nondeterministic kernels or a race are likely"


@dataclass(frozen=True)
class Plan:
    """What to do."""

    steps: int = STEPS
    kills: int = KILLS
    processes: int | None = None
    """None for as many as the strategy needs."""
    seed: int | None = None
    """Of the random moments; None for another one each time."""


@dataclass(frozen=True)
class Verdict:
    """How it went."""

    steps: int
    processes: int
    seed: int
    hits: list[Hit]
    comparison: Comparison
    resumed: int | None
    """The step from which the attempt went on in which the first difference appeared; None without a difference, or
    where no attempt before it went on from a checkpoint."""
    place: Place | None
    """Where in the step the difference begins."""
    hint: str | None

    @property
    def identical(self) -> bool:
        return self.comparison.identical


def verify_resume(config: RunConfig, plan: Plan, folder: Path, say: Say, start: Launch) -> Verdict:
    """Carry it out in `folder`, which holds both runs afterwards; TrainerError where a training fails by itself."""
    processes = plan.processes or (1 if config.strategy.name in ONE_PROCESS else 2)
    seed = random.SystemRandom().randrange(2**31) if plan.seed is None else plan.seed
    path = folder / "config.yaml"
    path.write_text(dump(config))
    path.write_text(dump(load(path, overrides(config, plan.steps))))

    say(f"an undisturbed run on {processes} process{'es' if processes > 1 else ''} ...")
    arguments = fit_arguments(path, f"runs_dir={folder / UNDISTURBED}", "resume=never")
    with start(arguments, processes, folder / "logs" / UNDISTURBED) as ranks:
        require_done(ranks, finish(ranks), "")
    undisturbed = only_run(folder / UNDISTURBED, config.name)
    went = course(undisturbed)
    say(f"{went.steps} steps; the same run, to be killed and resumed {plan.kills} × (--seed {seed}) ...")
    when = moments(went, plan.kills, random.Random(seed))
    arguments = fit_arguments(path, f"runs_dir={folder / KILLED}", "resume=auto")
    hits = _kill(config.name, arguments, processes, when, folder, say, start)

    from trainer.verify.compare_runs import compare_runs

    killed = only_run(folder / KILLED, config.name)
    comparison = compare_runs(undisturbed, killed)
    resumed, place, hint = None, None, None
    if not comparison.identical:
        resumed = max((met.saved for met in hits if 0 < met.saved < comparison.step), default=None)
        place, hint = _cause(path, killed, processes, resumed, comparison, folder, say, start)
    return Verdict(went.steps, processes, seed, hits, comparison, resumed, place, hint)


def overrides(config: RunConfig, steps: int) -> list[str]:
    """What makes a config short, with evaluations and saves to be killed in, and keeps all that is to be compared."""
    save, evaluate = config.checkpoint.every_steps, config.evaluate.every_steps
    return [
        f"train.max_steps={steps}",
        "train.max_epochs=null",
        "train.log_every=1",
        f"checkpoint.every_steps={min(save or steps, max(1, steps // SAVES))}",
        f"checkpoint.keep={steps + 1}",
        "checkpoint.every_minutes=null",  # by the clock, the two runs would save at different steps
        f"evaluate.every_steps={min(evaluate or steps, max(1, steps // EVALUATIONS))}",
        "tracking.enabled=false",
    ]


def _kill(
    name: str, arguments: Sequence[str], processes: int, when: Sequence[Moment], folder: Path, say: Say, start: Launch
) -> list[Hit]:
    """Train, kill, resume, and so on to the end; what each kill met."""
    runs_dir, logs = folder / KILLED, folder / "logs"
    hits: list[Hit] = []
    for moment in when:
        with start(arguments, processes, logs / f"attempt-{len(hits) + 1}") as ranks:
            if wait_for(moment, ranks, runs_dir, name):
                ranks.kill()
            codes = finish(ranks)
            if -signal.SIGKILL not in codes:
                _require_done(ranks, codes, hits, logs)
        if only_run(runs_dir, name).status == FINISHED:
            say(f"it ended before kill {len(hits) + 1} of {len(when)} could come: raise --steps, or lower --kills")
            return hits
        hits.append(hit(len(hits) + 1, moment, runs_dir, name))
        say(shown(hits[-1]))
    with start(arguments, processes, logs / f"attempt-{len(hits) + 1}") as ranks:
        _require_done(ranks, finish(ranks), hits, logs)
    return hits


def shown(met: Hit) -> str:
    """A kill in one line."""
    beside = ", a checkpoint being written" if met.writing else ""
    then = f"goes on from step {met.saved}" if met.saved else "begins anew"
    return f"kill {met.number}: in step {met.step}, phase {met.phase}{beside} (wanted: {met.wanted}); {then}"


def _require_done(ranks: LocalRanks, codes: Sequence[int], hits: Sequence[Hit], logs: Path) -> None:
    if any(code != EXIT_DONE for code in codes):
        when = f"after kill {hits[-1].number} the run does not go on" if hits else "started once more, it failed"
        raise TrainerError(f"{when}: {own_words(ranks, codes)} ({logs / f'attempt-{len(hits) + 1}'})")


def _cause(
    path: Path,
    killed: Run,
    processes: int,
    resumed: int | None,
    found: Comparison,
    folder: Path,
    say: Say,
    start: Launch,
) -> tuple[Place | None, str]:
    """Where in its step a difference begins, and what usually causes it."""
    if found.state is None and found.entry is not None and found.entry.key.startswith(("val/", "test/")):
        return None, IN_EVALUATION
    if resumed is None:
        return None, NOT_REPRODUCIBLE
    say(f"they differ from step {found.step} on: training that step again, once with a resume and once without ...")
    try:
        place = _listen(path, killed, processes, resumed, found.step, folder, start)
        if place is not None and place.stage == "weights before" and found.step - 1 > resumed:
            say("its weights differ before it begins: the same for the step before ...")
            place = _listen(path, killed, processes, resumed, found.step - 1, folder, start) or place
    except TrainerError as error:  # what was found is worth telling all the same
        return None, f"unknown: the step could not be trained again ({error})"
    return place, HINTS[place.stage] if place is not None else NOT_AGAIN


def _listen(
    path: Path, killed: Run, processes: int, resumed: int, step: int, folder: Path, start: Launch
) -> Place | None:
    """Train up to `step`, from the beginning and from the checkpoint of step `resumed`, and compare that step."""
    from trainer.verify import compare_steps

    place = folder / f"step-{step}"
    place.mkdir()
    fresh = place / "config.yaml"
    fresh.write_text(dump(load(path, [f"runs_dir={place / 'fresh'}"])))
    again = Run(place / "resumed" / killed.path.parent.name / killed.id)
    later = {str(found) for found in checkpoint.present(killed.checkpoints) if checkpoint.step_of(found) > resumed}
    shutil.copytree(
        killed.path, again.path, ignore=lambda at, names: [name for name in names if str(Path(at, name)) in later]
    )
    heard = []
    for config, name, resume in ((fresh, "fresh", None), (path, "resumed", str(again.path))):
        out = place / f"heard-{name}"
        run_probe(Order(str(config), str(out), step=step, resume=resume, stops=True), processes, start)
        run = again if resume else only_run(place / name, killed.path.parent.name)
        heard.append(compare_steps.read(out, processes, run))
    return compare_steps.first_place(heard[0], heard[1], tolerance=0.0)

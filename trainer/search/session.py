"""One `trainer tune` from its config to what it leaves: cluster, workers, search, results."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trainer.search import cluster
from trainer.search.afterwards import Place, confirm, retrain
from trainer.search.apart import Stopped
from trainer.search.channel import Message
from trainer.search.cluster import Need
from trainer.search.drive import TARGET, Driver
from trainer.search.folder import FAILED, FINISHED, INTERRUPTED, SearchFolder
from trainer.search.journal import Journal
from trainer.search.pool import Pool
from trainer.search.progress import Progress
from trainer.search.space import read_space
from trainer.search.trial import Trial

if TYPE_CHECKING:
    from trainer.config import RunConfig
    from trainer.preemption import Preemption
    from trainer.search.confirm import Confirmation
    from trainer.search.search import Search

Say = Callable[[str], None]
WARM = "trainer.search.warm:warm_up"
"""What a worker's host does before it takes trials."""


@dataclass(frozen=True)
class Plan:
    """What is asked for beside the config."""

    address: str | None = None
    """Ray cluster; None starts one on this machine."""
    warm_start: Sequence[str] = ()
    confirm: int | None = None
    """How many of the best to repeat."""
    retrain: bool = False
    target: str = TARGET
    warm: str = WARM


@dataclass(frozen=True)
class Outcome:
    """How it ended."""

    search: Search
    stopped: str | None = None
    """Where it was stopped: by what, and how far it was."""
    warning: str | None = None
    """What the user should know about tracking."""
    confirmation: Confirmation | None = None
    retrained: dict[str, Any] | None = None


def setup_of(folder: SearchFolder, warm: str = WARM) -> Message:
    """What every worker is told once."""
    here = os.getcwd()
    return {
        "cwd": here,
        # An empty entry is the folder of the one who looks; a worker looks from elsewhere.
        "sys_path": [path or here for path in sys.path],
        "search": str(folder.path.resolve()),
        "logs": str(folder.logs.resolve()),
        "mark": folder.mark,
        "warm": warm,
        "config": str(folder.base.resolve()),
    }


def most_at_once(config: RunConfig) -> int:
    """The most trials that may run at the same time, whatever there is room for."""
    tune = config.tune
    return min(tune.num_samples, tune.max_concurrent or tune.num_samples)


def conduct(config: RunConfig, folder: SearchFolder, plan: Plan, wish: Preemption, say: Say) -> Outcome:
    """Search, and what comes after it; `folder` is closed with the status that it ends with.

    A wish to stop is no error: `Outcome.stopped` tells.
    """
    from trainer.search.search import Search

    known = _known(config, plan, say)
    setup = setup_of(folder, plan.warm)
    with cluster.connected(plan.address, setup):
        wish.take_back()
        need = Need(config.tune.cpus_per_trial, config.tune.gpus_per_trial)
        pool = Pool(setup, need, most_at_once(config), say)
        journal = Journal(folder.path / "journal.jsonl")
        try:
            search = Search(config, read_space(config.tune.space), journal, known)  # while the workers start
            for number in search.running():  # by the driver that wrote the journal, which is gone
                search.interrupted(number)
            outcome = _search(config, folder, plan, search, pool, wish, say)
        finally:
            pool.close()
            journal.close()
    folder.close(FINISHED if outcome.stopped is None else INTERRUPTED, outcome.stopped)
    return outcome


def _known(config: RunConfig, plan: Plan, say: Say) -> list[Trial]:
    """Earlier trials from all that --warm-start names."""
    if not plan.warm_start:
        return []
    from trainer.search.known import find_known

    known: list[Trial] = []
    for source in plan.warm_start:
        found = find_known(source, config, read_space(config.tune.space), first=-1 - len(known))
        known += found.trials
        for line in found.lines:
            say(line)
    return known


def _search(
    config: RunConfig, folder: SearchFolder, plan: Plan, search: Search, pool: Pool, wish: Preemption, say: Say
) -> Outcome:
    """Train all trials, then what was asked for beside; what is known so far is on the disk at any moment."""
    from trainer.search.tracking import SearchTracker

    tracker = SearchTracker(folder.path, config, say) if config.tracking.enabled else None
    if tracker is not None:
        tracker.start()
    status, outcome = FAILED, Outcome(search)
    threading.Thread(target=_import_ahead, name="imports", daemon=True).start()
    try:
        if _train(config, folder, plan, search, pool, wish, say):
            outcome = _afterwards(plan, outcome, Place(config, folder, pool, wish, say))
        else:
            outcome = replace(outcome, stopped=_how_far(search, wish))
        status = FINISHED if outcome.stopped is None else INTERRUPTED
    finally:
        folder.update(status=status)  # before MLflow gets it
        _write(config, folder, search, status)
        warning = tracker.finish(status) if tracker is not None else None
    return replace(outcome, warning=warning)


def _import_ahead() -> None:
    """What the end of a search needs takes two seconds to import, in which trials run now and nothing would then."""
    for name in ("sklearn.ensemble", "optuna.importance", "optuna.visualization"):
        importlib.import_module(name)


def _train(
    config: RunConfig, folder: SearchFolder, plan: Plan, search: Search, pool: Pool, wish: Preemption, say: Say
) -> bool:
    from trainer.search.results import Results, write_best

    results = Results(folder.path, list(search.trials.values()))
    progress = Progress(search, say)

    def ended(trial: Trial) -> None:
        results.append(trial)
        if trial in search.best():
            write_best(folder.path, search.best(), search.objective.modes)
        progress.ended(trial)

    say(f"{pool.size} trial{'s' if pool.size != 1 else ''} at once, {search.num_samples} in all")
    return Driver(config, search, pool, folder, wish, ended, plan.target).run()


def _afterwards(plan: Plan, outcome: Outcome, place: Place) -> Outcome:
    from trainer.search.results import write_best

    search = outcome.search
    best = search.best()
    try:
        if plan.confirm is not None and len(best) > 1:
            confirmation = confirm(place, best[: plan.confirm])
            outcome = replace(outcome, confirmation=confirmation)
            best = [search.trials[confirmation.best]]
            write_best(place.folder.path, best, search.objective.modes)
        if plan.retrain and best:
            outcome = replace(outcome, retrained=retrain(place, best[0]))
    except Stopped as why:
        outcome = replace(outcome, stopped=str(why))
    return outcome


def _write(config: RunConfig, folder: SearchFolder, search: Search, status: str) -> None:
    """The report, of whatever there is."""
    from trainer.search.report_page import Heading, write_report

    tune, best = config.tune, [trial.number for trial in search.best()]
    heading = Heading(
        config.name,
        search.objective.modes,
        tune.sampler.name,
        tune.scheduler.name,
        status,
        best=best[:1] if search.objective.is_single else best,
    )
    write_report(folder.path, heading, in_order(search), read_space(tune.space))


def in_order(search: Search) -> list[Trial]:
    """All trials by number, known ones first."""
    return [trial for _, trial in sorted(search.trials.items())]


def _how_far(search: Search, wish: Preemption) -> str:
    ended = sum(trial.has_ended for number, trial in search.trials.items() if number >= 0)
    return f"stopped by {wish.signal_name} after {ended} of {search.num_samples} trials"

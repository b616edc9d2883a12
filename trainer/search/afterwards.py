"""After a search: are the best trials really different, and the best one trained on all there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.config import Holdout
from trainer.errors import TrainerError
from trainer.search.apart import Apart
from trainer.search.channel import Message
from trainer.search.confirm import Confirmation, compare
from trainer.search.drive import order
from trainer.search.rules import objectives_of
from trainer.search.space import overrides
from trainer.search.trial import Trial

if TYPE_CHECKING:
    from trainer.config import RunConfig
    from trainer.preemption import Preemption
    from trainer.search.folder import SearchFolder
    from trainer.search.pool import Pool

SEEDS = 5
"""How often each of the best is repeated: a spread of fewer values says little."""


@dataclass(frozen=True)
class Place:
    """Where more trainings can run."""

    config: RunConfig
    folder: SearchFolder
    pool: Pool
    wish: Preemption
    say: Callable[[str], None]


def confirm(place: Place, top: Sequence[Trial]) -> Confirmation:
    """Train each of `top` with `SEEDS` other seeds, the same ones for all, and compare them.

    The value that chose them is left out: the best of many is lucky, too.
    Raises Stopped after a wish to stop.
    """
    tune = place.config.tune
    folds = range(place.config.holdout.folds) if tune.cross_validate else [None]
    seeds = [place.config.seed + 1 + number for number in range(SEEDS)]
    place.say(f"confirming: trials {', '.join(str(trial.number) for trial in top)}, {SEEDS} other seeds each")
    orders = {
        (trial.number, seed, fold): order(
            place.folder,
            place.config,
            f"confirm-t{trial.number:04d}-s{seed}" + ("" if fold is None else f"-f{fold}"),
            [*overrides(trial.params), f"seed={seed}"],
            number=trial.number,
            fold=fold,
        )
        for seed in seeds
        for trial in top
        for fold in folds
    }
    done = Apart(place.pool, place.wish).run(list(orders.values()))
    metric, mode = next(iter(objectives_of(place.config).items()))
    repeats: dict[int, list[float]] = {trial.number: [] for trial in top}
    for trial in top:
        for seed in seeds:
            names = [orders[trial.number, seed, fold]["name"] for fold in folds]
            values = [_value(done[name], metric, place, name) for name in names]
            repeats[trial.number].append(sum(values) / len(values))
    return compare(repeats, mode)


def retrain(place: Place, best: Trial) -> dict[str, Any]:
    """Train the best on train and val together and evaluate it once on test.

    Returns `trial`, its `run` directory, and `metrics`. Raises TrainerError in the training's own words.
    """
    place.say(f"training trial {best.number} on train and val together")
    more = [
        *("holdout.method=none", "evaluate.test=true", "evaluate.pictures=true", "checkpoint.monitor=null"),
        f"tracking.enabled={str(place.config.tracking.enabled).lower()}",
    ]
    # What was cut into folds before is whole now.
    plain = Holdout()
    more += [f"holdout.folds={plain.folds}", f"holdout.fold={plain.fold}", f"holdout.seed={plain.seed}"]
    more.append("holdout.group_by=null")
    name = f"retrain-t{best.number:04d}"
    asked = order(place.folder, place.config, name, overrides(best.params), number=best.number, more=more)
    message = Apart(place.pool, place.wish).run([asked])[name]
    if message["status"] != "finished":
        raise TrainerError(f"trial {best.number} could not be trained again: {_why(message)}; see {asked['log']}")
    return {"trial": best.number, "run": message["run"], "metrics": message["metrics"]}


def _value(message: Message, metric: str, place: Place, name: str) -> float:
    if message["status"] == "finished" and metric in message["metrics"]:
        return float(message["metrics"][metric])
    place.say(f"{name} has no {metric}: {_why(message)}")
    return float("nan")


def _why(message: Message) -> str:
    return str(message.get("error") or f"it ended as {message['status']}")

"""How many evaluations a whole trial has, as far as the config alone tells."""

from __future__ import annotations

import math
from collections.abc import Iterable

from trainer.config import RunConfig

_DECIDES = ("train.max_epochs", "train.max_steps", "evaluate.every_epochs", "evaluate.every_steps")


def evaluations(config: RunConfig, varied: Iterable[str] = ()) -> int | None:
    """Evaluations of a trial's run; with cross-validation the number of folds.

    None where it depends on the number of samples, or on a key that is `varied`: the run itself tells it then.
    """
    if config.tune.cross_validate:
        return config.holdout.folds
    if any(key in _DECIDES for key in varied):
        return None
    train, evaluate = config.train, config.evaluate
    counts = []
    for length, other, every, other_every in (
        (train.max_epochs, train.max_steps, evaluate.every_epochs, evaluate.every_steps),
        (train.max_steps, train.max_epochs, evaluate.every_steps, evaluate.every_epochs),
    ):
        if length is not None and other is None and every is not None and other_every is None:
            counts.append(math.ceil(length / every))  # the end of training is evaluated, too
    return counts[0] if counts else None

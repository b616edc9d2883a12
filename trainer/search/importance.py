"""How much each parameter mattered, by functional ANOVA (Hutter, Hoos & Leyton-Brown, ICML 2014) on a random forest.

It is Optuna's; said here is where it would answer nonsense.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainer.search.past_study import past_study
from trainer.search.trial import FINISHED, Trial

if TYPE_CHECKING:
    import optuna

    from trainer.search.space import Space

LEAST_TRIALS = 4
"""Finished trials below which nothing is said."""
MOST_TRIALS = 200
"""The newest ones: the forest takes seconds for more, and changes little."""
TREES = 32


@dataclass(frozen=True)
class Importances:
    """Of one objective."""

    values: dict[str, float] = field(default_factory=dict)
    """Share of the variance by key, largest first; they sum up to 1. Empty where nothing can be said."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Keys that were not looked at, with the reason."""
    reason: str | None = None
    """Why nothing can be said."""


def importances(trials: Sequence[Trial], space: Space, objective: Mapping[str, str], number: int = 0) -> Importances:
    """For objective `number`, from the finished trials (those known before the search, too)."""
    finished = [
        trial
        for trial in trials
        if trial.state == FINISHED and len(trial.values or ()) > number and math.isfinite((trial.values or ())[number])
    ]  # fmt: skip
    if len(finished) < LEAST_TRIALS:
        return Importances(reason=f"needs at least {LEAST_TRIALS} finished trials, there are {len(finished)}")
    values = [trial.values[number] for trial in finished if trial.values]
    if max(values) == min(values):
        return Importances(reason="all finished trials have the same value")
    left_out: dict[str, str] = {}
    for parameter in space:
        had = [trial.params[parameter.key] for trial in finished if parameter.key in trial.params]
        if len(had) < len(finished):
            left_out[parameter.key] = f"not in all trials ({len(had)} of {len(finished)})"
        elif all(value == had[0] for value in had):
            left_out[parameter.key] = "the same in all trials"
    looked_at = [parameter.key for parameter in space if parameter.key not in left_out]
    if not looked_at:
        return Importances(left_out=left_out, reason="no parameter has different values in all finished trials")
    newest = sorted(finished, key=lambda trial: trial.number)[-MOST_TRIALS:]
    shares = _fanova(past_study(newest, space, objective), looked_at, number)
    if not shares or not all(map(math.isfinite, shares.values())) or sum(shares.values()) <= 0:
        return Importances(left_out=left_out, reason="the parameters explain nothing of the values")
    return Importances(shares, left_out)


def _fanova(study: optuna.Study, keys: list[str], number: int) -> dict[str, float]:
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    def target(trial: optuna.trial.FrozenTrial) -> float:
        return float(trial.values[number])

    try:
        found = get_param_importances(
            study,
            evaluator=FanovaImportanceEvaluator(n_trees=TREES, seed=0),
            params=keys,
            target=target,
            normalize=True,
        )
    except (ValueError, RuntimeError, ZeroDivisionError):  # of a forest that found nothing to split
        return {}
    return {key: float(share) for key, share in sorted(found.items(), key=lambda item: -item[1])}

"""The trials of a search as an Optuna study to look at: for plots and importances, never to ask for the next trial.

Unlike the study that samples, it takes whatever was trained: values that population based training moved out of the
range, and known trials of another search.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from trainer.search.trial import FAILED, FINISHED, PRUNED, Trial

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

    from trainer.search.space import Parameter, Space

POINTS_AT_MOST = 60_000
"""Of all learning curves together; longer ones are thinned out, their last point stays."""
LABEL_LENGTH = 32


def past_study(
    trials: Sequence[Trial],
    space: Space,
    objective: Mapping[str, str],
    times: Mapping[int, tuple[float, float]] | None = None,
) -> optuna.Study:
    """A study of the trials that have ended, under their own numbers (negative for those known before the search).

    `times` holds start and end of trials as Unix time. Texts are fit for a plot: a choice that is a list or a mapping
    is JSON, long ones are cut, and what HTML would take for markup is escaped.
    """
    import optuna

    ended = sorted(
        (trial for trial in trials if trial.state in (FINISHED, PRUNED, FAILED)), key=lambda trial: trial.number
    )
    labels = {parameter.key: Labels(parameter, ended) for parameter in space}
    shown = [
        {key: labels[key].of(value) for key, value in trial.params.items() if key in labels} for trial in ended
    ]  # fmt: skip
    distributions = {
        parameter.key: _distribution(
            parameter, labels[parameter.key].all, [params[parameter.key] for params in shown if parameter.key in params]
        )
        for parameter in space
    }
    keep = max(POINTS_AT_MOST // max(len(ended), 1), 2)
    frozen = []
    for trial, params in zip(ended, shown, strict=True):
        is_finished = trial.state == FINISHED and _is_whole(trial, objective)
        states = {FINISHED: optuna.trial.TrialState.COMPLETE, PRUNED: optuna.trial.TrialState.PRUNED}
        item = optuna.trial.create_trial(
            state=states[trial.state] if is_finished or trial.state == PRUNED else optuna.trial.TrialState.FAIL,
            values=list(trial.values or ()) if is_finished else None,
            params=params,
            distributions={key: distributions[key] for key in params},
            intermediate_values=curve(trial, next(iter(objective)), keep) if len(objective) == 1 else {},
        )
        item.number = trial.number
        item.datetime_start, item.datetime_complete = map(_moment, (times or {}).get(trial.number, (0.0, 0.0)))
        frozen.append(item)
    return _study(frozen, ["maximize" if mode == "max" else "minimize" for mode in objective.values()])


def _study(trials: list[optuna.trial.FrozenTrial], directions: list[Any]) -> optuna.Study:
    """Optuna's own storage would number the trials anew."""
    import optuna

    class PastStudy(optuna.Study):
        def get_trials(self, deepcopy: bool = True, states: Any = None, *_: Any, **__: Any) -> Any:
            return [trial for trial in trials if states is None or trial.state in states]

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        empty = optuna.create_study(directions=directions)
    finally:
        optuna.logging.set_verbosity(verbosity)
    return PastStudy(study_name=empty.study_name, storage=empty._storage)


class Labels:
    """How the values of one parameter are written in a plot: each value of its own by a text of its own."""

    def __init__(self, parameter: Parameter, trials: Sequence[Trial]) -> None:
        self._is_number = parameter.kind != "choice"
        self.all: list[Any] = []
        """Labels of all choices."""
        self._known: dict[str, Any] = {}
        had = [trial.params[parameter.key] for trial in trials if parameter.key in trial.params]
        if self._is_number and all(_is_number(value) for value in had):
            return
        self._is_number = False
        for value in [*parameter.choices, *had]:
            if (key := _json(value)) not in self._known:
                self._known[key] = self._new(value)
        self.all = list(self._known.values())

    def of(self, value: Any) -> Any:
        """The label; a number is its own."""
        return value if self._is_number else self._known[_json(value)]

    def _new(self, value: Any) -> str:
        text = value if isinstance(value, str) else _json(value)
        text = html.escape(text if len(text) <= LABEL_LENGTH else f"{text[: LABEL_LENGTH - 1]}…", quote=False)
        known = set(self._known.values())
        return next(name for name in (text, *(f"{text} ({n})" for n in range(2, len(known) + 3))) if name not in known)


def curve(trial: Trial, metric: str, keep: int) -> dict[int, float]:
    """The metric by iteration, at most about `keep` points of it."""
    points = [(report.iteration, report.metrics[metric]) for report in trial.reports if metric in report.metrics]
    every = max(-(-len(points) // keep), 1)
    thinned = points[::-1][::every][::-1]
    return {iteration: value for iteration, value in thinned if math.isfinite(value)}


def _is_whole(trial: Trial, objective: Mapping[str, str]) -> bool:
    return trial.values is not None and len(trial.values) == len(objective) and all(map(math.isfinite, trial.values))


def _distribution(parameter: Parameter, labels: Sequence[Any], values: Sequence[Any]) -> BaseDistribution:
    """The parameter's own, widened where there are values outside of it."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if labels or parameter.kind == "choice":
        return CategoricalDistribution(list(labels) or [""])
    low, high = min([parameter.low, *values]), max([parameter.high, *values])
    log = (parameter.log or parameter.kind == "log_uniform") and low > 0
    if parameter.kind == "int" and all(float(value).is_integer() for value in values):
        return IntDistribution(int(low), int(high), log=log)
    return FloatDistribution(float(low), float(high), log=log)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None)

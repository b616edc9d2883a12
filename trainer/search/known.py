"""Known points of a search: trials and runs that were trained before, for the sampler to begin with.

They come from another search, a run, the folder of an experiment (its runs and searches), or an MLflow experiment.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from trainer.errors import TrainerError, UserError
from trainer.run import FINISHED as RUN_FINISHED
from trainer.run import STOPPED, Run
from trainer.search.parameter import identity
from trainer.search.results import BASE_FILE, TRIALS_FILE, read_entries, trial_of
from trainer.search.rules import objectives_of
from trainer.search.trial import FINISHED, PRUNED, Report, Trial

if TYPE_CHECKING:
    from trainer.config import RunConfig
    from trainer.search.parameter import Parameter
    from trainer.search.space import Space

NOT_FINISHED, UNREADABLE = "not finished", "unreadable"


class Skipped(Exception):
    """This one can't be taken; the text is what it is counted under."""


@dataclass(frozen=True)
class Known:
    """What was found."""

    trials: list[Trial] = field(default_factory=list)
    """Finished or pruned, with negative numbers, in the order they were found."""
    lines: list[str] = field(default_factory=list)
    """What to say."""


@dataclass(frozen=True)
class Candidate:
    """One earlier training, wherever it comes from."""

    origin: str
    state: str
    """`finished`, `pruned`, or whatever else it was."""
    params: Mapping[str, Any]
    """Dotted key -> value, of what was varied."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Nested, for keys that were not varied."""
    reports: Sequence[Report] = ()
    is_text: bool = False
    """Whether values came through MLflow, which keeps all as text."""


@dataclass(frozen=True)
class Wanted:
    """What a known point must have."""

    space: Space
    objective: Mapping[str, str]
    value: Literal["last", "best"]


def find_known(source: str, config: RunConfig, space: Space, first: int = -1) -> Known:
    """The earlier trainings that `--warm-start` names; their numbers go down from `first`.

    A source is a search's or a run's directory, the folder of an experiment, its name under `runs_dir`, or the name of
    an experiment of the MLflow that `config.tracking` names. Raises UserError for one that gives nothing.
    """
    wanted = Wanted(space, objectives_of(config), config.tune.value)
    trials: list[Trial] = []
    skipped = Counter[str]()
    for candidate in _candidates(source, config, wanted):
        try:
            found = candidate() if callable(candidate) else candidate
            trials.append(replace(_point(found, wanted), number=first - len(trials)))
        except Skipped as why:
            skipped[str(why)] += 1
    line = _line(source, len(trials), skipped)
    if not trials:
        raise UserError(f"--warm-start: {line}")
    return Known(trials, [line])


Found = Candidate | Callable[[], Candidate]
"""Read when it is its turn: what can't be read is counted with the others."""


def _candidates(source: str, config: RunConfig, wanted: Wanted) -> Iterator[Found]:
    path = Path(source)
    if not path.exists() and len(path.parts) == 1 and (Path(config.runs_dir) / source).is_dir():
        path = Path(config.runs_dir) / source
    if not path.exists():
        from trainer.search.known_mlflow import mlflow_candidates

        return mlflow_candidates(source, config, wanted.objective)
    folder = path.parent if path.is_file() else path
    if (folder / TRIALS_FILE).is_file() or (folder / "search.json").is_file():
        return _of_search(folder)
    if (folder / "config.yaml").is_file():
        return iter([partial(_of_run, Run(folder), wanted.objective)])
    return _of_experiment(folder, wanted.objective)


def _of_experiment(folder: Path, objective: Mapping[str, str]) -> Iterator[Found]:
    for child in sorted(folder.iterdir()):
        if (child / TRIALS_FILE).is_file():
            yield from _of_search(child)
        elif (child / "config.yaml").is_file():
            yield partial(_of_run, Run(child), objective)


def _of_search(folder: Path) -> Iterator[Found]:
    base = _mapping(folder / BASE_FILE)
    for entry in read_entries(folder):
        yield partial(_of_trial, folder, base, entry)


def _of_trial(folder: Path, base: Mapping[str, Any], entry: Mapping[str, Any]) -> Candidate:
    try:
        trial = trial_of(entry)
    except (KeyError, TypeError, ValueError) as error:
        raise Skipped(UNREADABLE) from error
    return Candidate(
        origin=trial.origin or f"{folder}, trial {trial.number}",
        state=trial.state,
        params=trial.params,
        config=base,
        reports=trial.reports,
    )


def _of_run(run: Run, objective: Mapping[str, str]) -> Candidate:
    status = run.status
    if status not in (RUN_FINISHED, STOPPED):
        raise Skipped(NOT_FINISHED)
    config = _mapping(run.path / "config.yaml")
    if not config:
        raise Skipped(UNREADABLE)
    try:
        entries = list(run.read_metrics())
    except TrainerError as error:
        raise Skipped(UNREADABLE) from error
    state = FINISHED if status == RUN_FINISHED else PRUNED
    return Candidate(str(run.path), state, {}, config, reports_of(entries, objective))


def reports_of(entries: Sequence[Mapping[str, Any]], objective: Mapping[str, str]) -> list[Report]:
    """The evaluations among the entries of a `metrics.jsonl`: those that hold a metric of the objective."""
    began = float(entries[0].get("time", 0.0)) if entries else 0.0
    reports: list[Report] = []
    for entry in entries:
        if not any(metric in entry for metric in objective):
            continue
        metrics = {
            key: float(value)
            for key, value in entry.items()
            if key not in ("step", "time", "epoch") and isinstance(value, int | float) and not isinstance(value, bool)
        }
        seconds = float(entry.get("time", began)) - began
        epoch = float(entry.get("epoch", 0.0))
        reports.append(Report(len(reports) + 1, int(entry.get("step", 0)), epoch, metrics, seconds))
    return reports


def _point(candidate: Candidate, wanted: Wanted) -> Trial:
    """The trial that stands for it; raises Skipped."""
    if candidate.state not in (FINISHED, PRUNED):
        raise Skipped("failed" if candidate.state == "failed" else NOT_FINISHED)
    params: dict[str, Any] = {}
    for parameter in wanted.space:
        if parameter.is_active(params):
            params[parameter.key] = _param(parameter, candidate)
    values = []
    for metric, mode in wanted.objective.items():
        series = [report.metrics[metric] for report in candidate.reports if metric in report.metrics]
        if not series or not math.isfinite(series[-1]):
            raise Skipped(f"without {metric}")
        finite = [value for value in series if math.isfinite(value)]
        best = max(finite) if mode == "max" else min(finite)
        is_best = wanted.value == "best" and candidate.state == FINISHED and len(wanted.objective) == 1
        values.append(best if is_best else series[-1])
    return Trial(
        number=0,
        params=params,
        state=candidate.state,
        reports=list(candidate.reports),
        values=tuple(values),
        origin=candidate.origin,
    )


def _param(parameter: Parameter, candidate: Candidate) -> Any:
    missing = object()
    value = candidate.params.get(parameter.key, missing)
    if value is missing:
        value = _lookup(candidate.config, parameter.key, missing)
    if value is not missing:
        for reading in _readings(value) if candidate.is_text else [value]:
            taken = _taken(parameter, reading)
            if taken is not None:
                return taken[0]
    raise Skipped(f"outside the space ({parameter.key})")


def _taken(parameter: Parameter, value: Any) -> tuple[Any] | None:
    """The value as the parameter has it: the choice itself, a number of its kind; None where it doesn't contain it."""
    if parameter.kind != "choice":
        if not parameter.contains(value):
            return None
        return (int(value) if parameter.kind == "int" else value,)
    for choice in parameter.choices:
        if identity(choice) == identity(value):
            return (choice,)
    # A resolved config holds every option of a component, also those that the choice leaves to their defaults
    wide = [choice for choice in parameter.choices if _is_within(choice, value)]
    return (wide[0],) if len(wide) == 1 else None


def _is_within(choice: Any, value: Any) -> bool:
    if not isinstance(choice, Mapping) or not isinstance(value, Mapping):
        return False
    return all(
        key in value and (identity(value[key]) == identity(inner) or _is_within(inner, value[key]))
        for key, inner in choice.items()
    )


def _readings(value: Any) -> list[Any]:
    """What a text of MLflow may have been."""
    if isinstance(value, Mapping):
        return [{key: _readings(inner)[0] for key, inner in value.items()}]
    if not isinstance(value, str):
        return [value]
    try:
        return [yaml.safe_load(value), value]
    except yaml.YAMLError:
        return [value]


def _lookup(config: Mapping[str, Any], key: str, missing: object) -> Any:
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return missing
        value = value[part]
    return value


def _mapping(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _line(source: str, taken: int, skipped: Counter[str]) -> str:
    total = taken + sum(skipped.values())
    if not total:
        return f"no run and no trial in {source}"
    left_out = ", ".join(f"{count} {why}" for why, count in skipped.most_common())
    runs = "run" if total == 1 else "runs"
    return f"{taken} of {total} {runs} of {source} taken as known points" + (f"; {left_out}" if left_out else "")

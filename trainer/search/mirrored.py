"""A search at MLflow: one run with the whole search, and each trial a run nested in it. Imports no mlflow.

The mirror's process reads what the search leaves (`base.yaml`, `trials.jsonl`, `best.yaml`) and the `metrics.jsonl` of
the trials' runs, and knows nothing of the search's own process but whether it lives.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from trainer.errors import UserError
from trainer.mirrored import STATUS_TAG
from trainer.run import DAMAGED, RUNNING
from trainer.search.folder import read_record
from trainer.search.results import BASE_FILE, BEST_FILE, TRIALS_FILE, read_entries
from trainer.spool import Point

if TYPE_CHECKING:
    from trainer.config import RunConfig

SEARCH_FILE = "search.json"
STATE_FOLDER = "mlflow"
"""Holds how far each trial is sent."""
TRIALS_FOLDER = "trials"
TRIAL_FOLDER = re.compile(r"t(\d+)(?:-f(\d+))?")
"""Of `trials/`: the experiment of a trial, or of one of its folds."""
ERROR_LENGTH = 2000
REPLACING = ("pbt", "population_based")
"""Beginnings of names of schedulers that change a trial's parameters while it is trained."""


class FollowedSearch:
    """A search directory, as far as its end and its config are concerned."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def record(self) -> dict[str, Any]:
        """`search.json`; where that is damaged, the experiment's `name` and no more."""
        try:
            return read_record(self.path)
        except UserError:
            return {"name": self.path.parent.name, "status": DAMAGED}

    @property
    def status(self) -> str:
        """`running`, `finished`, `interrupted`, `failed`, `killed` or `damaged`, as far as this host can tell."""
        return str(self.record["status"])

    def config(self) -> RunConfig:
        """The resolved config."""
        from trainer.load import load

        return load(self.path / BASE_FILE)

    def base(self) -> dict[str, Any]:
        """The resolved config; empty where it can't be read."""
        try:
            found = yaml.safe_load((self.path / BASE_FILE).read_bytes())
        except (OSError, yaml.YAMLError):
            return {}
        return found if isinstance(found, dict) else {}


class MirroredSearch:
    """The whole search."""

    def __init__(self, folder: FollowedSearch) -> None:
        self._folder = folder
        self.path = folder.path
        self.id = self.name = folder.path.name
        self.base = folder.base()
        self.objective = objective_of(self.base)
        self.entries: dict[int, dict[str, Any]] = {}
        self._read: tuple[int, int] | None = None

    def refresh(self) -> None:
        """See which trials have ended meanwhile."""
        try:
            found = (self.path / TRIALS_FILE).stat()
        except FileNotFoundError:
            return
        version = (found.st_ino, found.st_size)  # it is appended to, or replaced
        if version == self._read:
            return
        self._read = version
        self.entries = {entry["number"]: entry for entry in read_entries(self.path)}

    def best(self) -> dict[str, Any] | None:
        """The finished trial with the best first value."""
        sign = -1 if next(iter(self.objective.values()), "max") == "min" else 1
        finished = [entry for entry in self.entries.values() if entry["state"] == "finished" and _values(entry)]
        return max(finished, key=lambda entry: (sign * _values(entry)[0], -entry["number"]), default=None)

    def first_tags(self) -> dict[str, str]:
        return {"trainer.kind": "search"}

    def version(self) -> object:
        best = self.best()
        return len(self.entries), best and best["number"]

    def config(self) -> dict[str, Any]:
        return self.base

    def tags(self) -> dict[str, str]:
        states = [entry["state"] for entry in self.entries.values() if entry["number"] >= 0]
        best = self.best()
        told = {}
        if best is not None:
            told = {"trainer.best.trial": str(best["number"]), "trainer.best.params": json.dumps(best["params"])}
            pairs = zip(self.objective, _values(best), strict=False)
            told |= {f"trainer.best.{metric}": repr(value) for metric, value in pairs}
        return {
            STATUS_TAG: self._folder.status,
            "trainer.kind": "search",
            "trainer.run_dir": str(self.path.resolve()),
            "trainer.trials": json.dumps({state: states.count(state) for state in dict.fromkeys(states)}),
            "mlflow.source.name": "trainer tune",
            "mlflow.source.type": "LOCAL",
            **told,
        }

    def logs(self) -> dict[str, tuple[Path, str]]:
        return {}

    def points(self) -> list[Point]:
        """What each trial reached, and the best so far, by the number of trials that have ended."""
        points, best = [], dict[str, float]()
        own = [entry for entry in self.entries.values() if entry["number"] >= 0]
        for count, entry in enumerate(own, start=1):
            if entry["state"] != "finished":
                continue
            moment = int(1000 * entry.get("ended", 0))
            for (metric, mode), value in zip(self.objective.items(), _values(entry), strict=False):
                better = max if mode == "max" else min
                best[metric] = better(best.get(metric, value), value)
                points.append(Point(f"objective/{metric}", value, moment, count))
                points.append(Point(f"best/{metric}", best[metric], moment, count))
        return points

    def files(self, is_final: bool) -> Iterator[tuple[Path, str]]:
        """Those that grow with each trial go at the end only."""
        best = sorted(path.name for path in self.path.glob("best-*.yaml"))
        late = [TRIALS_FILE, "report.html", SEARCH_FILE] if is_final else []
        for name in (BASE_FILE, BEST_FILE, *best, *late):
            if (self.path / name).is_file():
                yield self.path / name, name

    def ended_at(self) -> int:
        """As its last trial."""
        moments = [float(entry.get("ended", 0)) for entry in self.entries.values()]
        return int(1000 * max([*moments, (self.path / BASE_FILE).stat().st_mtime]))

    def note_id(self, mlflow_id: str) -> None:
        """`tracking.json` holds it."""


class MirroredTrial:
    """One trial: all its runs (folds, segments of population based training) are one run at MLflow."""

    def __init__(self, search: MirroredSearch, number: int, parent: Callable[[], str]) -> None:
        """`parent` gives the MLflow run of the search."""
        self._search = search
        self._number = number
        self._parent = parent
        self.name = f"t{number:04d}" if number >= 0 else f"known{-number:04d}"
        self.id = f"{search.id}/{self.name}"
        self.path = search.path / STATE_FOLDER / self.name
        self.path.mkdir(parents=True, exist_ok=True)
        self.runs: list[tuple[Path, str]] = []
        """Run directories, with the prefix of their metrics."""

    @property
    def entry(self) -> dict[str, Any] | None:
        """What `trials.jsonl` says, once the trial has ended."""
        return self._search.entries.get(self._number)

    def first_tags(self) -> dict[str, str]:
        return {"mlflow.parentRunId": self._parent(), "trainer.kind": "trial"}

    def version(self) -> object:
        return self.entry is not None, bool(self.runs), self._parent()

    def config(self) -> dict[str, Any]:
        """What was varied: while it runs, as its first run's config has it."""
        if self.entry is not None:
            return dict(self.entry["params"])
        tune = self._search.base.get("tune") or {}
        scheduler = tune.get("scheduler") or {}
        name = str(scheduler.get("name", "") if isinstance(scheduler, Mapping) else scheduler)
        if not self.runs or name.startswith(REPLACING):  # MLflow lets no parameter change
            return {}
        try:
            config = yaml.safe_load((self.runs[0][0] / "config.yaml").read_bytes())
        except (OSError, yaml.YAMLError):
            return {}
        return {key: value for key in tune.get("space") or {} for value in _lookup(config, key)}

    def tags(self) -> dict[str, str]:
        tags = {
            STATUS_TAG: self.entry["state"] if self.entry is not None else RUNNING,
            "trainer.kind": "trial",
            "trainer.trial": str(self._number),
            "trainer.search": self._search.id,
            "mlflow.parentRunId": self._parent(),
            "mlflow.source.name": "trainer tune",
            "mlflow.source.type": "LOCAL",
        }
        entry = self.entry or {}
        for key in ("error", "traceback", "origin"):
            if entry.get(key):
                tags[f"trainer.{key}"] = str(entry[key])[-ERROR_LENGTH:]
        for key in ("history", "runs"):
            if entry.get(key):
                tags[f"trainer.{key}"] = json.dumps(entry[key])
        return tags

    def logs(self) -> dict[str, tuple[Path, str]]:
        return {str(run.relative_to(self._search.path)): (run / "metrics.jsonl", prefix) for run, prefix in self.runs}

    def points(self) -> list[Point]:
        """The objective as it was told to the search."""
        entry = self.entry
        if entry is None:
            return []
        reports = entry.get("reports") or []
        step = int(reports[-1]["step"]) if reports else 0
        moment = int(1000 * entry.get("ended", 0))
        pairs = zip(self._search.objective, _values(entry), strict=False)
        return [Point(f"objective/{metric}", value, moment, step) for metric, value in pairs]

    def files(self, is_final: bool) -> Iterator[tuple[Path, str]]:
        return iter(())

    def ended_at(self) -> int:
        if self.entry is not None and "ended" in self.entry:
            return int(1000 * self.entry["ended"])
        files = [run / "metrics.jsonl" for run, _ in self.runs]
        moments = [file.stat().st_mtime for file in files if file.exists()]
        return int(1000 * max(moments)) if moments else self._search.ended_at()

    def note_id(self, mlflow_id: str) -> None:
        """`tracking.json` holds it; a run of a trial is no MLflow run of its own."""


def objective_of(base: Mapping[str, Any]) -> dict[str, str]:
    """Metric -> direction, of a resolved config."""
    objective = (base.get("tune") or {}).get("objective")
    if objective:
        return dict(objective)
    rule = base.get("checkpoint") or {}
    return {rule["monitor"]: rule.get("mode", "max")} if rule.get("monitor") else {}


def trial_folders(search: Path) -> dict[int, list[tuple[Path, str]]]:
    """Trial -> the folders of its runs, with the prefix of their metrics (`fold-2/`)."""
    found: dict[int, list[tuple[Path, str]]] = {}
    folder = search / TRIALS_FOLDER
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        named = TRIAL_FOLDER.fullmatch(path.name)
        if named and path.is_dir():
            prefix = f"fold-{int(named[2])}/" if named[2] else ""
            found.setdefault(int(named[1]), []).append((path, prefix))
    return found


def _values(entry: Mapping[str, Any]) -> list[float]:
    return [
        float(value) for value in entry.get("values") or [] if isinstance(value, int | float) and math.isfinite(value)
    ]


def _lookup(config: Any, key: str) -> list[Any]:
    for part in key.split("."):
        if not isinstance(config, dict) or part not in config:
            return []
        config = config[part]
    return [config]

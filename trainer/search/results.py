"""What a search leaves for whoever reads it: `trials.jsonl`, one object per ended trial, and `best.yaml`, which trains.

The journal is the truth; these files are made from it, and made again as a whole when a search goes on.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.files import append_line, write_atomically
from trainer.load import dump, load
from trainer.metrics_log import NON_FINITE
from trainer.mirror_log import redacted, secrets_in
from trainer.search.space import overrides
from trainer.search.trial import Report, Trial

if TYPE_CHECKING:
    from trainer.config import RunConfig

TRIALS_FILE = "trials.jsonl"
BEST_FILE = "best.yaml"
BASE_FILE = "base.yaml"
GO_ON = "trainer tune --resume"
_FIELDS = (
    "number",
    "state",
    "params",
    "values",
    "reports",
    "folds",
    "seconds",
    "attempts",
    "failures",
    "error",
    "traceback",
    "runs",
    "segment",
    "history",
    "origin",
)


class Results:
    """`trials.jsonl` of one search; written by one process, read by any. It holds each trial once."""

    def __init__(self, folder: Path, trials: Sequence[Trial] = ()) -> None:
        """Make the file say exactly what `trials` say (those that have ended; their order of ending is kept)."""
        self.path = folder / TRIALS_FILE
        old = {entry["number"]: entry for entry in read_entries(folder)}
        order = {number: place for place, number in enumerate(old)}
        ended = sorted(
            (trial for trial in trials if trial.has_ended),
            key=lambda trial: (order.get(trial.number, len(order)), trial.number),
        )
        self._entries = {trial.number: entry_of(trial, old.get(trial.number, {}).get("ended")) for trial in ended}
        if ended or self.path.exists():
            self._rewrite()

    def append(self, trial: Trial) -> None:
        """Add a trial that has ended, and bring it to the disk; one that is there is replaced."""
        assert trial.has_ended, f"trial {trial.number} is {trial.state}"
        known = self._entries.get(trial.number)
        entry = entry_of(trial, known["ended"] if known else None)
        if entry == known:
            return
        self._entries[trial.number] = entry
        if known is None:
            append_line(self.path, entry, GO_ON)
        else:
            self._rewrite()

    def _rewrite(self) -> None:
        lines = "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in self._entries.values())
        write_atomically(self.path, lines.encode())


def entry_of(trial: Trial, ended: float | None = None) -> dict[str, Any]:
    """A trial as one object of JSON; `ended` is Unix time, now where not given."""
    whole = {name: getattr(trial, name) for name in _FIELDS}
    whole["reports"] = [asdict(report) for report in trial.reports]
    whole["overrides"] = overrides(trial.params)
    secrets = secrets_in(os.environ)  # these files are sent to MLflow, as the report is that is made of them
    for name in ("error", "traceback"):
        whole[name] = None if whole[name] is None else redacted(whole[name], secrets)
    whole["ended"] = round(time.time(), 3) if ended is None else ended
    plain = _plain(whole)
    assert isinstance(plain, dict)
    return plain


def trial_of(entry: Mapping[str, Any]) -> Trial:
    """The trial that `entry_of` wrote down. Raises KeyError, TypeError or ValueError for anything else."""
    known = {name: entry[name] for name in _FIELDS if name in entry}
    values = known.pop("values", None)
    reports = [
        Report(
            int(item["iteration"]), int(item["step"]), _number(item["epoch"]),
            _numbers(item["metrics"]), _number(item["seconds"]),
        )
        for item in known.pop("reports", [])
    ]  # fmt: skip
    return Trial(
        **{
            **known,
            "reports": reports,
            "values": None if values is None else tuple(map(_number, values)),
            "folds": [_numbers(fold) for fold in known.get("folds", [])],
        }
    )


def read_entries(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a search's `trials.jsonl`, which may be written to meanwhile; later ones win. Damaged lines
    are left out: the journal, from which they are made anew, is the place where damage is told."""
    try:
        lines = (folder / TRIALS_FILE).read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    found: dict[int, dict[str, Any]] = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("number"), int):
            found[entry["number"]] = entry
    return list(found.values())


def write_best(folder: Path, best: Sequence[Trial], objective: Mapping[str, str]) -> list[Path]:
    """Write `best.yaml` from `base.yaml`, where it changes: a config that trains the best trial's parameters again.

    `best` comes best first. With several objectives it is the Pareto front: each of its trials gets a file of its own,
    `best-<number>.yaml`, and `best.yaml` is the one with the best first objective. Returns the files that are there.
    """
    if not best:
        return []
    chosen = {BEST_FILE: best[0]}
    if len(objective) > 1:
        sign = 1 if next(iter(objective.values())) == "max" else -1
        chosen = {BEST_FILE: max(best, key=lambda trial: sign * (trial.values or (-sign * math.inf,))[0])}
        chosen |= {f"best-{trial.number}.yaml": trial for trial in best}
    for name, trial in chosen.items():
        text = best_config(folder, trial, objective).encode()
        path = folder / name
        if not path.exists() or path.read_bytes() != text:
            write_atomically(path, text)
    for left in folder.glob("best-*.yaml"):  # no longer on the front
        if left.name not in chosen:
            left.unlink()
    return [folder / name for name in chosen]


def best_config(folder: Path, trial: Trial, objective: Mapping[str, str]) -> str:
    """The text of `best.yaml` for a trial: the resolved config under a comment that says where it comes from."""
    config = load(folder / BASE_FILE, overrides(trial.params))
    values = zip(objective.items(), trial.values or (), strict=False)
    reached = ", ".join(f"{metric} {value:.6g} ({mode})" for (metric, mode), value in values)
    lines = [
        f"Trial {trial.number} of the search {folder}" + (f": {reached}" if reached else ""),
        "The same as: " + fit_command(folder, trial),
        *schedule(trial),
    ]
    comment = "".join(f"# {line}\n" for text in lines for line in text.splitlines())
    return f"{comment}{dump(without_search(config))}"


def fit_command(folder: Path, trial: Trial) -> str:
    """The command that trains the parameters of a trial again."""
    return shlex.join(["trainer", "fit", "--config", str(folder / BASE_FILE), *overrides(trial.params)])


def schedule(trial: Trial) -> list[str]:
    """Lines about the parameters that a trial had before population based training replaced them; none without that."""
    if not trial.history:
        return []
    lines = ["Its parameters changed during the training; those above are the last. Before that it had:"]
    for part in trial.history:
        until = part.get("iteration")
        params = part.get("params") or {key: value for key, value in part.items() if key != "iteration"}
        lines.append(f"  until evaluation {until}: {' '.join(overrides(params))}")
    return lines


def without_search(config: RunConfig) -> RunConfig:
    """The config of a training: without the section `tune`."""
    return replace(config, tune=type(config.tune)())


def _plain(value: Any) -> Any:
    """For JSON, which knows no infinite numbers and no tuples: as `metrics.jsonl` writes them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _number(value: Any) -> float:
    return NON_FINITE[value] if isinstance(value, str) else float(value)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {key: _number(value) for key, value in values.items()}

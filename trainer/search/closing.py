"""The end of a search for the terminal, and the same as plain data for other programs."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from trainer.progress import aligned, duration, print_line, summary_table
from trainer.search.importance import importances
from trainer.search.report_page import grouped_errors, shown
from trainer.search.results import BEST_FILE, TRIALS_FILE
from trainer.search.trial import ENDED, FAILED, FINISHED, PRUNED, Trial

if TYPE_CHECKING:
    from trainer.search.space import Space

SHOWN_TRIALS = 5
SHOWN_ERRORS = 5
NUMBERS_AT_MOST = 8
WIDTH = 24
"""Characters of an importance's bar."""


def summary(
    folder: Path,
    trials: Sequence[Trial],
    best: Sequence[Trial],
    space: Space,
    objective: Mapping[str, str],
    **more: Any,
) -> dict[str, Any]:
    """Everything that `show` shows, for `--json`; numbers that are not finite are null. `more` is added as it is.

    `best` comes best first; with several objectives it is the Pareto front, and all of it is there.
    """
    own = [trial for trial in trials if trial.number >= 0]
    counts = Counter(trial.state for trial in own)
    listed = best if len(objective) > 1 else best[:SHOWN_TRIALS]
    found = {metric: importances(trials, space, objective, number) for number, metric in enumerate(objective)}
    return {
        "search": str(folder),
        "objective": dict(objective),
        "counts": {
            state: counts.get(state, 0) for state in (*ENDED, *(state for state in counts if state not in ENDED))
        },
        "known": len(trials) - len(own),
        "best": [_best(trial, objective) for trial in listed],
        "importances": {
            metric: {"values": item.values, "left_out": item.left_out, "reason": item.reason}
            for metric, item in found.items()
        },
        "seconds": trial_seconds(own),
        "errors": [{"error": error, "trials": numbers} for error, numbers in grouped_errors(own)],
        "next": _next(folder, listed),
        **more,
    }


def trial_seconds(trials: Sequence[Trial]) -> dict[str, float]:
    """Seconds that trials held a slot, and on what they were spent.

    `other` is what is neither training nor evaluation: set-up, checkpoints, and a slot's wait for the search.
    """
    total = {
        kind: sum(trial.seconds.get(kind, 0.0) for trial in trials) for kind in ("train", "evaluate", "setup", "slot")
    }
    known = total["train"] + total["evaluate"]
    slot = max(total["slot"], known)
    return {
        "train": total["train"],
        "evaluate": total["evaluate"],
        "setup": total["setup"],
        "other": slot - known,
        "slot": slot,
    }


def show(told: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Print what `summary` gives, on stderr where nothing else is given."""
    objective = told["objective"]
    if told["best"]:
        front = "Pareto front" if len(objective) > 1 else "best trials"
        print_line(f"\n{front}", stream)
        for line in aligned(*_best_table(told)):
            print_line(f"  {line}", stream)
    for metric, item in told["importances"].items():
        lines = _importance_lines(item)
        if lines:
            print_line(f"\nimportances for {metric} (fANOVA, share of the variance)", stream)
        for line in lines:
            print_line(f"  {line}", stream)
    print_line("", stream)
    summary_table(_rows(told), Path(told["search"]).parent.name, stream)


def _best(trial: Trial, objective: Mapping[str, str]) -> dict[str, Any]:
    last = trial.reports[-1] if trial.reports else None
    return {
        "trial": trial.number,
        "state": trial.state,
        "values": {
            metric: value if math.isfinite(value) else None
            for metric, value in zip(objective, trial.values or (), strict=False)
        },
        "params": trial.params,
        "evaluations": len(trial.reports),
        "step": last.step if last else None,
        "epoch": last.epoch if last else None,
        "runs": list(trial.runs),
        "origin": trial.origin,
        "history": list(trial.history),
    }


def _best_table(told: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    metrics = list(told["objective"])
    rows = []
    for item in told["best"]:
        values = [_number(item["values"].get(metric)) for metric in metrics]
        where = f"step {item['step']}" if item["step"] is not None else "-"
        if item["history"]:
            where += f", {len(item['history'])} x replaced"
        params = "  ".join(f"{key}={shown(value)}" for key, value in item["params"].items())
        rows.append([str(item["trial"]), *values, where, params])
    return ["trial", *metrics, "trained to", "parameters"], rows


def _importance_lines(item: Mapping[str, Any]) -> list[str]:
    if not item["values"]:
        return []
    names = max(map(len, item["values"]))
    lines = [
        f"{key:<{names}}  {share:4.2f}  {'█' * round(WIDTH * share)}".rstrip() for key, share in item["values"].items()
    ]
    return lines + [f"{key} is left out: {why}" for key, why in item["left_out"].items()]


def _rows(told: Mapping[str, Any]) -> list[tuple[str, str]]:
    counts = told["counts"]
    shown_counts = [f"{count} {state}" for state, count in counts.items() if count or state in (FINISHED, PRUNED)]
    rows = [("trials", ", ".join(shown_counts))]
    if told["known"]:
        rows.append(("known before", str(told["known"])))
    for item in told["errors"][:SHOWN_ERRORS]:
        numbers = item["trials"]
        named = ", ".join(map(str, numbers[:NUMBERS_AT_MOST])) + (" ..." if len(numbers) > NUMBERS_AT_MOST else "")
        rows.append((FAILED, f"{len(numbers)} x {item['error']} (trial {named})"))
    left = len(told["errors"]) - SHOWN_ERRORS
    if left > 0:
        rows.append(("", f"and {left} other errors, see {told['search']}/{TRIALS_FILE}"))
    seconds = told["seconds"]
    if seconds["slot"]:
        parts = [
            f"{duration(seconds[kind])} {name}" for kind, name in (("train", "training"), ("evaluate", "evaluation"))
        ]
        rest = f"{duration(seconds['other'])} everything else ({seconds['other'] / seconds['slot']:.0%})"
        rows.append(("trial time", f"{duration(seconds['slot'])}: {', '.join(parts)}, {rest}"))
    rows.append(("search directory", told["search"]))
    if told.get("mlflow"):
        rows.append(("MLflow", told["mlflow"]))
    rows += [("next" if number == 0 else "", line) for number, line in enumerate(told["next"])]
    return rows


def _next(folder: Path, best: Sequence[Trial]) -> list[str]:
    quoted = shlex.quote(str(folder))
    more = f"trainer tune --resume {quoted} --num-samples N"
    return [f"trainer fit --config {shlex.quote(str(folder / BEST_FILE))}", more] if best else [more]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"

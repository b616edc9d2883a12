"""Look at past runs, find the best, register its model.

trainer runs list                                  all runs, newest first
trainer runs show RUN                              one run: how it ended, its metrics and checkpoints
trainer runs best --metric val/accuracy            the run with the best value
trainer runs register RUN --name digits --alias champion
trainer runs sync [RUN]                            send to MLflow what could not be sent (of all runs)
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import EXIT_DONE, TrainerError, UserError
from trainer.progress import print_table
from trainer.run import DAMAGED, RUNNING, Run, find_runs

if TYPE_CHECKING:
    from trainer.search.mirrored import FollowedSearch
    from trainer.tracking import Tracker

SHOWN_IN_BEST = 10


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = _action(actions, "list", "all runs, newest first")
    listing.add_argument("--name", help="only runs of this experiment")
    show = _action(actions, "show", "one run: how it ended, its metrics and checkpoints")
    best = _action(actions, "best", "the run with the best value of a metric")
    best.add_argument("--metric", required=True, help="e.g. val/accuracy")
    best.add_argument(
        "--mode", choices=("max", "min"), help="which is better; min for a loss where not given, else max"
    )
    best.add_argument("--name", help="only runs of this experiment")
    register = _action(actions, "register", "make the best checkpoint of a run a version of a registered model")
    register.add_argument("--name", required=True, metavar="MODEL", help="name of the registered model")
    register.add_argument("--alias", help="name by which this version is found, e.g. champion")
    sync = _action(actions, "sync", "send to MLflow what could not be sent during the run")
    sync.add_argument("--wait", type=float, default=600, metavar="SECONDS", help="give a run up after this long (600)")
    text = "run directory, or run id (its beginning is enough)"
    for command in (show, register):
        command.add_argument("run", metavar="RUN", help=text)
    sync.add_argument("run", metavar="RUN", nargs="?", help=f"{text}; where not given, all that have something unsent")


def run(args: argparse.Namespace) -> int:
    ACTIONS[args.action](args)
    return EXIT_DONE


def _action(actions: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.add_argument("--runs-dir", default="runs", metavar="FOLDER", help="folder of all runs (runs)")
    # Also accepted behind the action; SUPPRESS keeps what was given before it.
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object")
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    return parser


def _list(args: argparse.Namespace) -> None:
    rows = [_row(found) for found in find_runs(args.runs_dir, args.name)]
    if args.json:
        print(json.dumps({"runs": rows}))
    elif rows:
        lines = [(row["name"], row["run_id"], row["status"], _day(row["created"]), _text(row["step"])) for row in rows]
        print_table(("experiment", "run", "status", "started (UTC)", "step"), lines)
    else:
        of_name = f" of {args.name}" if args.name else ""
        print(f"no runs{of_name} in {args.runs_dir}/ yet; start one with: trainer fit --config quickstart.yaml")


def _row(found: Run) -> dict[str, Any]:
    status = found.status
    record = {} if status == DAMAGED else found.record
    return {
        "name": found.path.parent.name,
        "run_id": found.id,
        "path": str(found.path),
        "status": status,
        "exit_reason": record.get("exit_reason"),
        "created": record.get("created"),
        "updated": record.get("updated"),
        "world_size": record.get("world_size"),
        "step": found.last_step(),
    }


def _show(args: argparse.Namespace) -> None:
    from trainer import checkpoint

    found = Run.open(args.run, args.runs_dir)
    record = {**found.record, "status": found.status}
    metrics = _summary(found)
    checkpoints = [path.name for path in checkpoint.present(found.checkpoints)]
    if args.json:
        summary = {"path": str(found.path), **record, "metrics": metrics, "checkpoints": checkpoints}
        print(json.dumps(_without_nan(summary)))
        return
    git = record["git"]
    code = (
        f"{git['commit'][:12]} on {git['branch']}{', changed (git.diff)' if git['dirty'] else ''}" if git else "no git"
    )
    reason = f" ({record['exit_reason']})" if record["exit_reason"] else ""
    rows = [
        ("run directory", str(found.path)),
        ("status", record["status"] + reason),
        ("started, updated", f"{_day(record['created'])}, {_day(record['updated'])} UTC"),
        (
            "attempts",
            f"{len(record['attempts'])}, the last on {record['host']} with {record['world_size']} process(es)",
        ),
        ("code", code),
        ("lineage", record["lineage"]["id"]),
        ("MLflow run", record["mlflow_run_id"] or "none"),
        ("checkpoints", ", ".join(checkpoints) or "none"),
    ]
    print_table(("", found.path.parent.name), rows)
    print()
    lines = [(key, *(_text(values[what]) for what in ("last", "min", "max"))) for key, values in metrics.items()]
    print_table(("metric", "last", "min", "max"), lines)


def _summary(found: Run) -> dict[str, dict[str, float | int]]:
    """Last, smallest and largest value of each metric."""
    metrics: dict[str, dict[str, float | int]] = {}
    for entry in found.read_metrics():
        for key, value in entry.items():
            if key in ("step", "time", "epoch") or not isinstance(value, int | float):
                continue
            old = metrics.get(key, {"min": value, "max": value})
            low, high = (value, value) if math.isnan(old["min"]) else (min(old["min"], value), max(old["max"], value))
            metrics[key] = {"last": value, "step": entry.get("step", 0), "min": low, "max": high}
    return metrics


def _best(args: argparse.Namespace) -> None:
    mode = args.mode or ("min" if args.metric.endswith("loss") else "max")
    sign = 1 if mode == "max" else -1
    rows: list[dict[str, Any]] = []
    names: set[str] = set()
    for found in find_runs(args.runs_dir, args.name):
        try:
            values = _values(found, args.metric, names)
        except TrainerError as error:
            print(f"trainer: warning: left out: {error}", file=sys.stderr)
            continue
        if values:
            value, step = max(values, key=lambda pair: (sign * pair[0], -pair[1]))
            rows.append({**_row(found), "value": value, "step": step})
    if not rows:
        there = f"those there are: {', '.join(sorted(names))}" if names else "no run has logged any"
        raise UserError(f"--metric {args.metric}: no run in {args.runs_dir}/ has it; {there}")
    rows.sort(key=lambda row: sign * row["value"], reverse=True)
    if args.json:
        print(json.dumps({"metric": args.metric, "mode": mode, "best": rows[0], "runs": rows}))
        return
    lines = [(_text(row["value"]), _text(row["step"]), row["status"], row["path"]) for row in rows[:SHOWN_IN_BEST]]
    print_table((args.metric, "step", "status", "run directory"), lines)


def _values(found: Run, metric: str, names: set[str]) -> list[tuple[float, int]]:
    """Finite values of a metric with their steps; adds the names of all metrics to `names`."""
    values = []
    for entry in found.read_metrics():
        names.update(entry.keys() - {"step", "time", "epoch"})
        value = entry.get(metric)
        if isinstance(value, int | float) and math.isfinite(value):
            values.append((float(value), int(entry.get("step", 0))))
    return values


def _register(args: argparse.Namespace) -> None:
    from trainer.registry import register

    version = register(Run.open(args.run, args.runs_dir), args.name, args.alias)
    if args.json:
        print(json.dumps(asdict(version)))
        return
    metrics = "".join(f", {key} {_text(value)}" for key, value in version.metrics.items())
    address = (
        f"models:/{version.model}@{version.alias}" if version.alias else f"models:/{version.model}/{version.version}"
    )
    print(f"{version.model} version {version.version}: step {version.step}{metrics}")
    print(f"{address} is {version.source}")


def _sync(args: argparse.Namespace) -> None:
    if args.run is None:
        _sync_all(args)
        return
    found = _found(args.run, args.runs_dir)
    if found.status == RUNNING:
        raise UserError(f"{found.path}: still running, and its own mirror is at work")
    tracker = _tracker(found)
    warning = _send_rest(found, tracker, args)
    if warning:
        raise TrainerError(warning)
    if args.json:
        print(json.dumps({"path": str(found.path), **_ids(found)}))


def _sync_all(args: argparse.Namespace) -> None:
    from trainer.search import tracking as search_tracking
    from trainer.unsent import is_unsent

    found: list[Run | FollowedSearch] = [run for run in find_runs(args.runs_dir) if is_unsent(run)]
    searches = search_tracking.find_searches(args.runs_dir)
    found += [search for search in searches if search_tracking.is_unsent(search)]
    failed: dict[str, str] = {}
    sent = []
    for run in found:
        try:
            tracker = _tracker(run)
        except UserError as error:  # its config names what is gone: the others can still be sent
            failed[str(run.path)] = str(error)
            continue
        # A server that took nothing from one run is not waited for again
        warning = failed.get(tracker.uri) or _send_rest(run, tracker, args)
        if warning:
            failed[tracker.uri] = warning
        else:
            sent.append(run)
    if args.json:
        print(json.dumps({"runs": [{"path": str(run.path), **_ids(run)} for run in sent]}))
    if failed:
        raise TrainerError(f"{len(found) - len(sent)} of {len(found)} runs were not sent; {'; '.join(failed.values())}")
    if not args.json:
        print(f"all runs in {args.runs_dir}/ are in MLflow")


def _found(name: str, runs_dir: str) -> Run | FollowedSearch:
    """A run, or the search whose directory it is."""
    from trainer.search.mirrored import SEARCH_FILE, FollowedSearch

    if (Path(name) / SEARCH_FILE).is_file():
        return FollowedSearch(Path(name))
    return Run.open(name, runs_dir)


def _ids(found: Run | FollowedSearch) -> dict[str, Any]:
    from trainer.tracking import read_state

    return {"run_id": found.path.name, "mlflow_run_id": read_state(found.path).get("mlflow_run_id")}


def _tracker(found: Run | FollowedSearch) -> Tracker:
    from trainer.search.tracking import SearchTracker
    from trainer.tracking import Tracker

    config = found.config()
    config = replace(config, tracking=replace(config.tracking, enabled=True, system_metrics=False))
    if isinstance(found, Run):
        return Tracker(found, config.tracking)
    return SearchTracker(found.path, config, is_over=True)


def _send_rest(run: Run | FollowedSearch, tracker: Tracker, args: argparse.Namespace) -> str | None:
    """Wait for a mirror of the run; one line about what is left, or None."""
    from trainer.tracking import DONE, mlflow_command, read_state

    tracker.start()
    warning = tracker.finish(run.status, args.wait, is_patient=True)
    if warning is not None and read_state(run.path).get("state") != DONE:
        return warning
    if warning is not None:  # what is refused today will be refused tomorrow
        print(f"trainer: warning: {warning}", file=sys.stderr)
    elif not args.json:
        print(f"all of {run.path} is in MLflow; look at it with: {mlflow_command(tracker.uri)}")
    return None


def _text(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _day(time: str | None) -> str:
    return time[:19].replace("T", " ") if time else "-"


def _without_nan(value: Any) -> Any:
    """JSON knows no NaN: such numbers become null."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


ACTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "list": _list,
    "show": _show,
    "best": _best,
    "register": _register,
    "sync": _sync,
}

"""Search hyper-parameters with Ray, in the space that the YAML gives under `tune:`.

trainer tune                                                       configs/tune-digits.yaml: minutes on two cores
trainer tune --num-samples 100 --gpus-per-trial 1 --address auto --config FILE
trainer tune --config FILE --dry-run                               the space, its size, what the search will cost
trainer tune --resume DIR                                          go on with a search that was stopped or killed
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from trainer import cli, world
from trainer.errors import EXIT_DONE, Preempted, UserError
from trainer.preemption import Preemption
from trainer.progress import print_line, print_table, summary_table

if TYPE_CHECKING:
    from trainer.config import RunConfig
    from trainer.search.folder import SearchFolder
    from trainer.search.session import Outcome

SHIPPED = "tune-digits.yaml"
FLAGS = {
    "num_samples": ("N", int, "trials to run"),
    "cpus_per_trial": ("C", float, "CPUs of one trial"),
    "gpus_per_trial": ("G", float, "GPUs of one trial"),
    "processes_per_trial": ("P", int, "ranks of one trial, which train it together under DDP"),
    "max_concurrent": ("M", int, "trials that run at once at most; as many as fit where not given"),
}
"""Flag -> metavar, type, help; each is short for the override `tune.<flag>=...`."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    cli.add_config_arguments(parser, required=False)
    for name, (metavar, kind, text) in FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", metavar=metavar, type=kind, help=f"{text} (tune.{name})")
    parser.add_argument(
        "--address", metavar="A", help="an existing Ray cluster, e.g. auto; a local one where not given"
    )
    parser.add_argument("--resume", metavar="DIR", help="directory of a search to go on with")
    parser.add_argument("--dry-run", action="store_true", help="show the space, its size and the cost; run nothing")
    parser.add_argument(
        "--warm-start",
        metavar="FROM",
        action="append",
        default=[],
        help="earlier trials as known points: a search, a run, a folder of runs, or an MLflow experiment",
    )
    parser.add_argument("--retrain", action="store_true", help="train the best on train and val, evaluate it on test")
    parser.add_argument("--confirm", metavar="K", type=int, help="first repeat the K best with other seeds")


def run(args: argparse.Namespace) -> int:
    """Search."""
    _check(args)
    with Preemption() as wish:
        wish.take_interrupts()
        config = _config(args)
        if args.dry_run:
            return _preview(config, args)
        with _folder(config, args) as folder:
            from trainer.search.session import Plan, conduct

            plan = Plan(args.address, tuple(args.warm_start), args.confirm, args.retrain)
            outcome = conduct(config, folder, plan, wish, print_line)
        if outcome.stopped is not None:
            wish.end()
            raise Preempted(f"{outcome.stopped}; go on with: trainer tune --resume {folder.path}")
        _show(config, folder, outcome, args.json)
    return EXIT_DONE


def _check(args: argparse.Namespace) -> None:
    if world.from_environment().launched:
        raise UserError("tune starts its processes by itself: run it without torchrun, and set --processes-per-trial")
    if args.resume and (args.config or args.warm_start):
        raise UserError("--resume goes on with what the search began with: leave --config and --warm-start out")
    if args.confirm is not None and args.confirm < 2:
        raise UserError(f"--confirm: got {args.confirm}, wanted at least 2: one trial has none to be compared with")


def _config(args: argparse.Namespace) -> RunConfig:
    """The config of the search, checked to have something to vary."""
    from trainer.load import load
    from trainer.search.folder import require_search
    from trainer.search.rules import objectives_of

    if args.resume:
        require_search(Path(args.resume))
    values = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    overrides = [*args.overrides, *(f"tune.{name}={value}" for name, value in values.items())]
    source = str(Path(args.resume, "base.yaml")) if args.resume else args.config or SHIPPED
    config = load(source, overrides)
    if args.resume:
        _require_same(load(source), config, args.resume)
    if not config.tune.space:
        example = "tune: {space: {optimizer.lr: {log_uniform: [1e-4, 1e-1]}}}"
        raise UserError(f"tune.space: {source} has nothing to vary: add, for example, {example}")
    objectives_of(config)
    return config


def _require_same(before: RunConfig, now: RunConfig, folder: str) -> None:
    from trainer.load import diff

    free = {f"tune.{name}" for name in (*FLAGS, "max_failures", "keep_checkpoints")}
    foreign = [key for key in diff(before, now) if key not in free]
    if foreign:
        raise UserError(
            f"{folder} is another search: {', '.join(foreign)} differ; leave them as they were, or begin a new one"
        )


@contextmanager
def _folder(config: RunConfig, args: argparse.Namespace) -> Iterator[SearchFolder]:
    """The directory of the search, with a record of how it ended."""
    from trainer.search.folder import FAILED, SearchFolder

    folder = SearchFolder.open(args.resume) if args.resume else SearchFolder.create(config)
    print_line(f"search directory: {folder.path}")
    try:
        yield folder
    except BaseException as error:
        folder.close(FAILED, " ".join(str(error).split()) or type(error).__name__)
        raise


def _preview(config: RunConfig, args: argparse.Namespace) -> int:
    from trainer.search.preview import preview

    seen = preview(config, args.address, print_line)
    print(json.dumps(seen.facts) if args.json else "\n".join(seen.lines))
    return EXIT_DONE


def _show(config: RunConfig, folder: SearchFolder, outcome: Outcome, as_json: bool) -> None:
    from trainer.search.closing import show, summary
    from trainer.search.confirm import HEAD
    from trainer.search.session import in_order
    from trainer.search.space import read_space
    from trainer.tracking import mlflow_command, tracking_uri

    search, confirmed, retrained = outcome.search, outcome.confirmation, outcome.retrained
    tracking = config.tracking
    mlflow = mlflow_command(tracking_uri(tracking, Path(config.runs_dir))) if tracking.enabled else None
    if outcome.warning:
        print_line(f"trainer: warning: {outcome.warning}")
    told = summary(
        folder.path,
        in_order(search),
        search.best(),
        read_space(config.tune.space),
        search.objective.modes,
        mlflow=mlflow,
        confirmed=confirmed.as_dict() if confirmed else None,
        retrained=retrained,
    )
    if as_json:
        print(json.dumps(told))
        return
    show(told)
    if confirmed is not None:
        print_line(f"\nrepeated with other seeds: {confirmed.conclusion()}")
        print_table(HEAD, confirmed.rows(), sys.stderr)
    if retrained is not None:
        rows = [(name, f"{value:.4f}") for name, value in retrained["metrics"].items() if name.startswith("test/")]
        rows += [("run directory", retrained["run"])]
        summary_table(rows, f"trial {retrained['trial']}, trained on train and val")

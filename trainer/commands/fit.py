"""Train what a YAML file describes; go on with an earlier run by --resume."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from trainer import cli, environment, world
from trainer.deferred import uncollected
from trainer.errors import EXIT_DONE, UserError
from trainer.preemption import Preemption
from trainer.progress import print_line, summary_table

if TYPE_CHECKING:
    from trainer.config import RunConfig
    from trainer.fit import Result
    from trainer.run import Run
    from trainer.world import World


def configure(parser: argparse.ArgumentParser) -> None:
    cli.add_config_arguments(parser, required=False)
    parser.add_argument("--resume", metavar="RUN", help="run directory or run id to go on with")


def run(args: argparse.Namespace, require: Callable[[RunConfig], None] = lambda config: None) -> int:
    """Train; `require` raises UserError for a config that another verb does not take."""
    place = world.from_environment()
    if place.launched:
        environment.signal_at_parents_end(signal.SIGTERM)  # a launcher that is killed can't end its ranks itself
    with Preemption() as preemption:  # from before the imports: a wish to stop is answered after the first step
        config, resume = _chosen(args)
        require(config)
        _fit(config, resume, place, preemption, args)
    return EXIT_DONE


def _chosen(args: argparse.Namespace) -> tuple[RunConfig, Run | None]:
    """The config to train, and the run to go on with where --resume names one."""
    from trainer.load import load
    from trainer.resume import resumed_config
    from trainer.run import Run

    if args.resume:
        resume = Run.open(args.resume)
        config = resumed_config(resume, args.config, args.overrides)
        if resume.status == "finished" and not args.overrides:
            raise UserError(
                f"{resume.path} is finished; to train longer, raise train.max_epochs, e.g. train.max_epochs=20"
            )
        return config, resume
    if args.config:
        return load(args.config, args.overrides), None
    raise UserError("nothing to train: pass --config FILE (e.g. --config quickstart.yaml) or --resume RUN")


def _fit(config: RunConfig, resume: Run | None, place: World, preemption: Preemption, args: argparse.Namespace) -> None:
    def say(text: str) -> None:
        if place.is_main:
            print_line(text)

    def tell(error: BaseException) -> None:
        cli.report(error, args.json, args.debug)

    parts = f"{config.recipe.name}, model {config.model.name}, data {config.data.name}"
    say(f"{config.name}: {parts}, {place.size} process{'es' if place.size > 1 else ''}")
    with uncollected():
        from trainer.fit import fit

    result = fit(config, resume, place, say, preemption, tell)
    if result is not None:
        _show(config, result, args.json)


def _show(config: RunConfig, result: Result, as_json: bool) -> None:
    from trainer.tracking import mlflow_command, tracking_uri

    command = (
        mlflow_command(tracking_uri(config.tracking, result.run.parent.parent)) if config.tracking.enabled else None
    )
    if result.warning:
        print(f"trainer: warning: {result.warning}", file=sys.stderr)
    if as_json:
        print(
            json.dumps(
                {
                    "run": str(result.run),
                    "status": "finished",
                    "steps": result.steps,
                    "metrics": result.metrics,
                    "samples_per_second": result.samples_per_second,
                    "tokens_per_second": result.tokens_per_second,
                    "data_wait": result.data_wait,
                    "mlflow": command,
                    "compared": {split: [asdict(row) for row in rows] for split, rows in result.compared.items()},
                }
            )
        )
        return
    split = "test/" if any(name.startswith("test/") for name in result.metrics) else "val/"
    shown = {f"{name}/{row.metric}" for name, rows in result.compared.items() for row in rows}
    values = [(name, value) for name, value in result.metrics.items() if name.startswith(split) and name not in shown]
    rows = [(name, f"{value:.4f}") for name, value in values]
    rows += _compared(result)
    speed = ("samples/s", f"{result.samples_per_second:,.0f}")
    if result.tokens_per_second:
        speed = ("tokens/s", f"{result.tokens_per_second:,.0f}")
    rows += [
        speed,
        ("waiting for data", f"{result.data_wait:.1%}"),
        ("run directory", str(result.run)),
    ]
    if command:
        rows.append(("MLflow", command))
    following = [f"trainer evaluate {result.run} --split {split.rstrip('/')}"]
    if config.adapter is not None:
        following = [f"trainer generate {result.run}", f"trainer merge {result.run}"]
    following.append(f"trainer fit --resume {result.run} train.max_epochs=N")
    rows += [("next" if number == 0 else "", line) for number, line in enumerate(following)]
    summary_table(rows, config.name)


def _compared(result: Result) -> list[tuple[str, str]]:
    """Before and after, with 95 % intervals, of each split that was evaluated before the first step."""
    rows = []
    for split, differences in result.compared.items():
        for row in differences:
            before, after = (f"{value:.4g} [{low:.4g}, {high:.4g}]" for value, low, high in (row.before, row.after))
            value, low, high = row.change
            change = f"{value:+.4g} [{low:+.4g}, {high:+.4g}]"
            rows.append((f"{split}/{row.metric}", f"{before} before, {after} after, change {change}"))
    return rows

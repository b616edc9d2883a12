"""Evaluate a run on one split of its data: the best checkpoint, the newest, or one by its step."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from trainer import world
from trainer.deferred import uncollected
from trainer.errors import EXIT_DONE, UserError
from trainer.progress import summary_table

if TYPE_CHECKING:
    from trainer.config import RunConfig
    from trainer.run import Run
    from trainer.world import World


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory or run id")
    parser.add_argument("--split", default="val", help="train, val or test (default: val)")
    parser.add_argument(
        "--checkpoint", default="best", help="best (by checkpoint.monitor), newest, or a step (default: best)"
    )
    parser.add_argument(
        "--lm-eval", metavar="TASKS", help="tasks of lm-eval in place of a split, where it is installed: arc_easy,piqa"
    )
    parser.add_argument("--lm-eval-tasks", metavar="FOLDER", help="folder with task files of your own for lm-eval")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the run's config, e.g. data.workers=4"
    )


def run(args: argparse.Namespace) -> int:
    from trainer.resume import resumed_config
    from trainer.run import Run

    if not (args.checkpoint in ("best", "newest") or args.checkpoint.isdigit()):
        raise UserError(f"--checkpoint: best, newest or a step is wanted, not {args.checkpoint!r}")
    place = world.from_environment()
    found = Run.open(args.run)
    config = resumed_config(found, None, args.overrides)

    def say(text: str) -> None:
        if place.is_main:
            print(text, file=sys.stderr, flush=True)

    if args.lm_eval is not None or args.lm_eval_tasks is not None:
        _lm_eval(args, found, config, place, say)
        return EXIT_DONE
    with uncollected():
        from trainer.evaluate import evaluate_run

    result = evaluate_run(found, config, args.checkpoint, args.split, place, say)
    if not place.is_main:
        return EXIT_DONE
    if args.json:
        print(json.dumps({"run": str(found.path), **asdict(result)}))
    else:
        rows = [(name, f"{value:.4f}") for name, value in result.metrics.items()]
        rows += [("samples", f"{result.samples - result.bad_samples:,}"), ("checkpoint", result.checkpoint)]
        rows.append(("pictures", str(found.artifacts / args.split)))
        summary_table(rows, f"{config.name}: {args.split}")
    return EXIT_DONE


def _lm_eval(args: argparse.Namespace, run: Run, config: RunConfig, place: World, say: Callable[[str], None]) -> None:
    from trainer import lm_eval_tasks

    if place.size > 1:
        raise UserError("--lm-eval: runs in one process: start it without torchrun")
    tasks = lm_eval_tasks.split_names(args.lm_eval or "")
    lm_eval_tasks.require_folder(args.lm_eval_tasks)
    values = lm_eval_tasks.evaluate(run, config, args.checkpoint, tasks, args.lm_eval_tasks, say)
    if args.json:
        print(json.dumps({"run": str(run.path), "metrics": values}))
        return
    rows = [(name, f"{value:.4f}") for name, value in values.items()]
    summary_table([*rows, ("written to", str(run.artifacts / lm_eval_tasks.FILE))], f"{config.name}: lm-eval")

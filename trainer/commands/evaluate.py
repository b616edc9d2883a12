"""Evaluate a run on one split of its data: the best checkpoint, the newest, or one by its step."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from trainer import world
from trainer.deferred import uncollected
from trainer.errors import EXIT_DONE, UserError
from trainer.progress import summary_table


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory or run id")
    parser.add_argument("--split", default="val", help="train, val or test (default: val)")
    parser.add_argument(
        "--checkpoint", default="best", help="best (by checkpoint.monitor), newest, or a step (default: best)"
    )
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
    with uncollected():
        from trainer.evaluate import evaluate_run

    def say(text: str) -> None:
        if place.is_main:
            print(text, file=sys.stderr, flush=True)

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

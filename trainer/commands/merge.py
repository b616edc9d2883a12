"""Fold a run's adapter into its base model, as a Hugging Face folder that plain transformers loads."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from trainer.errors import EXIT_DONE, UserError
from trainer.progress import summary_table


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("run", metavar="RUN", help="run directory or run id")
    parser.add_argument("--checkpoint", default="best", help="best, newest, or a step (default: best)")
    parser.add_argument("--output", metavar="FOLDER", help="where to write; must not be there yet (RUN/merged)")
    parser.add_argument(
        "--into",
        choices=["original", "dequantized"],
        help="after qlora: the base as published, or as the training saw it (default: dequantized)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="largest difference of a logit between merged and adapted model (1e-4)",
    )


def run(args: argparse.Namespace) -> int:
    """Merge, prove, write; 1 where the merged model is not the adapted one."""
    from trainer.run import Run

    if not (args.checkpoint in ("best", "newest") or args.checkpoint.isdigit()):
        raise UserError(f"--checkpoint: best, newest or a step is wanted, not {args.checkpoint!r}")
    found = Run.open(args.run)
    config = found.config()
    output = Path(args.output) if args.output else found.path / "merged"
    from trainer.merge import as_record, merge

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    result = merge(found, config, args.checkpoint, output, args.into, args.tolerance, say)
    if args.json:
        print(json.dumps({"run": str(found.path), **as_record(result)}))
        return EXIT_DONE
    rows = [
        ("checkpoint", result.checkpoint),
        ("merged into", f"the {result.into} base"),
        ("drift", f"{result.drift:.2g} against the adapter, {result.drift_from_trained:.2g} against the training"),
        ("model", result.folder),
        ("next", f"trainer generate {result.folder}"),
    ]
    summary_table(rows, config.name)
    return EXIT_DONE

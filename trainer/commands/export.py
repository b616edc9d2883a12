"""Make a run's checkpoint a bundle that can be served: program, preprocessing, proof, measurements.

The bundle answers its golden requests as the run's own evaluation did, or it is not written.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trainer import world
from trainer.deferred import uncollected
from trainer.errors import EXIT_DONE, UserError
from trainer.export.folder import published, require_free
from trainer.export.language import LanguageOptions, is_language_run, write_language_bundle
from trainer.export.wanted import FORMATS, QUANTISED, Wanted
from trainer.progress import print_line, summary_table

if TYPE_CHECKING:
    from trainer.config import RunConfig
    from trainer.export.writing import Exported
    from trainer.run import Run

GOLDEN, LANGUAGE_GOLDEN = 32, 8


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("run", metavar="RUN", help="run directory or run id")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="auto",
        help="of the program; auto measures those that this machine can make and takes the quickest (default: auto)",
    )
    parser.add_argument("--checkpoint", default="best", help="best, newest, or a step (default: best)")
    parser.add_argument("--output", metavar="FOLDER", help="where to write the bundle (RUN/bundle)")
    parser.add_argument("--name", help="of the model, as clients will call it (the run's name)")
    parser.add_argument("--golden", type=int, metavar="N", help="golden requests (32; of a language model 8)")
    parser.add_argument(
        "--samples", type=int, metavar="N", help="compare N samples of the split in place of all, where it is large"
    )
    parser.add_argument(
        "--quantize",
        choices=QUANTISED,
        action="append",
        default=[],
        help="try this type of weights, too, and show what it costs in accuracy; may be given twice",
    )
    parser.add_argument(
        "--price", type=float, metavar="USD", help="of an hour of such a machine, for the capacity card"
    )
    parser.add_argument(
        "--p95-ms", type=float, default=100.0, metavar="MS", help="bound of the p95, for the capacity card (100)"
    )
    parser.add_argument(
        "--adapters", action="store_true", help="of a language model: keep the adapter beside its base, not merged"
    )
    parser.add_argument(
        "--into",
        choices=["original", "dequantized"],
        help="of a language model trained with qlora: the base as published, or as the training saw it",
    )
    parser.add_argument("--force", action="store_true", help="replace a bundle that is there")


def run(args: argparse.Namespace) -> int:
    """Export; 1 where no program answers as the run does, and nothing is written then."""
    from trainer.run import Run

    _check(args)
    found = Run.open(args.run)
    config = found.config()
    if is_language_run(config):
        return _language(args, found, config)
    if args.adapters or args.into:
        raise UserError("--adapters, --into: are for language models with an adapter, which this run did not train")
    wanted = Wanted(
        output=Path(args.output) if args.output else found.path / "bundle",
        name=args.name or config.name,
        format=args.format,
        checkpoint=args.checkpoint,
        golden=args.golden or GOLDEN,
        samples=args.samples,
        quantise=tuple(dict.fromkeys(args.quantize)),
        price=args.price,
        p95_ms=args.p95_ms,
        force=args.force,
    )
    with uncollected():
        from trainer.export.writing import export

    result = export(found, config, wanted, _say)
    if args.json:
        print(json.dumps(_record(str(found.path), result)))
    else:
        _show(result)
    return EXIT_DONE


def _language(args: argparse.Namespace, run: Run, config: RunConfig) -> int:
    if args.format not in ("auto", "safetensors"):
        raise UserError(
            f"--format {args.format}: a language model is served from its folder for transformers: use safetensors"
        )
    if args.quantize or args.samples:
        raise UserError("--quantize, --samples: are not for language models")
    output = Path(args.output) if args.output else run.path / "bundle"
    options = LanguageOptions(
        name=args.name, adapters=args.adapters, golden=args.golden or LANGUAGE_GOLDEN, into=args.into, price=args.price
    )
    require_free(output, args.force)
    with uncollected(), published(output, args.force) as folder:
        result = write_language_bundle(run, config, args.checkpoint, folder, options, _say)
    bundle, capacity = result.bundle, result.measurements["capacity"]
    if args.json:
        told: dict[str, object] = {
            "run": str(run.path),
            "bundle": str(output),
            "name": bundle.name,
            "version": bundle.version,
        }
        told |= {"checkpoint": result.checkpoint, "format": "safetensors", "adapters": sorted(bundle.adapters)}
        told |= {"tolerance": bundle.golden.tolerance, "deviation": result.deviation, "metrics": bundle.metrics}
        print(json.dumps({**told, "capacity": capacity}))
        return EXIT_DONE
    rows = [
        ("checkpoint", result.checkpoint),
        ("deviation", f"{result.deviation:.2g} of a log-probability (tolerance {bundle.golden.tolerance:g})"),
        ("golden prompts", str(bundle.golden.count)),
        ("capacity", f"{capacity['tokens_per_second']:,.0f} tokens/s, without HTTP"),
        ("HPA target", f"{capacity['hpa_target_in_flight']} requests in flight per replica"),
        *[("adapter", f"{bundle.name}:{name}") for name in sorted(bundle.adapters)],
        ("version", bundle.version),
        ("bundle", str(output)),
        ("next", f"trainer serve {output}"),
    ]
    summary_table(rows, bundle.name)
    return EXIT_DONE


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _check(args: argparse.Namespace) -> None:
    if not (args.checkpoint in ("best", "newest") or args.checkpoint.isdigit()):
        raise UserError(f"--checkpoint: best, newest or a step is wanted, not {args.checkpoint!r}")
    for name in ("golden", "samples", "price", "p95_ms"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')}: must be above 0, not {value}")
    if args.name is not None and not args.name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise UserError(f"--name: {args.name!r}: letters, digits, `.`, `_` and `-` only")
    if world.from_environment().launched:
        raise UserError("trainer export runs in one process, whatever trained the run: start it without torchrun")


def _record(run: str, result: Exported) -> dict[str, object]:
    from trainer.export.table import plain

    return {
        "run": run,
        "bundle": str(result.folder),
        "name": result.bundle.name,
        "version": result.bundle.version,
        "checkpoint": result.bundle.run["checkpoint"],
        "format": result.chosen.name,
        "tolerance": result.bundle.golden.tolerance,
        "metrics": result.bundle.metrics,
        "formats": plain(result.rows, result.chosen.name),
        "capacity": result.capacity,
    }


def _show(result: Exported) -> None:
    from trainer.export.table import lines

    for line in lines(result.rows, result.chosen.name):
        print_line(line, sys.stdout)
    bundle, capacity = result.bundle, result.capacity
    rows = [
        ("checkpoint", str(bundle.run["checkpoint"])),
        ("program", f"{result.chosen.name}, within {bundle.golden.tolerance:g} of the run's own answers"),
        ("golden requests", str(bundle.golden.count)),
        ("capacity", f"{capacity['requests_per_second']:,.0f} requests/s at batch {capacity['batch']}, without HTTP"),
        ("HPA target", f"{capacity['hpa_target_in_flight']} requests in flight per replica"),
        ("version", bundle.version),
        ("bundle", str(result.folder)),
        ("next", f"trainer serve {result.folder}"),
    ]
    if "usd_per_thousand" in capacity:
        rows.insert(5, ("cost", f"{capacity['usd_per_thousand']:g} USD per thousand predictions at full use"))
    summary_table(rows, bundle.name)

"""Prove on a config that a killed run goes on to the same bits, or that all ways to train it give the same numbers.

trainer verify --resume --config resnet50.yaml      kills it at random moments, resumes it, compares bit by bit
trainer verify --parallel --config resnet50.yaml    one process, accumulation, DDP and FSDP side by side
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import cli, verify, world
from trainer.errors import EXIT_DONE, EXIT_FAILURE, TrainerError, UserError
from trainer.progress import print_line, print_table, summary_table

if TYPE_CHECKING:
    from trainer.config import RunConfig
    from trainer.verify.compare_steps import Place
    from trainer.verify.parallel import Outcome, Way
    from trainer.verify.resume import Verdict

ONLY_RESUME = ("kills", "seed")
ONLY_PARALLEL = ("tolerance",)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    cli.add_config_arguments(parser)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="kill, resume, compare with an undisturbed run")
    mode.add_argument("--parallel", action="store_true", help="compare one process, accumulation, DDP and FSDP")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps (24 with --resume, 3 with --parallel)")
    parser.add_argument("--processes", type=int, metavar="P", help="with --resume: as the strategy needs; else 2")
    parser.add_argument("--kills", type=int, metavar="K", help="with --resume: how often to kill (6)")
    parser.add_argument(
        "--seed", type=int, metavar="S", help="with --resume: repeats the random moments of another time"
    )
    parser.add_argument(
        "--tolerance", type=float, metavar="T", help="with --parallel: largest relative difference (by train.precision)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the folder with the runs also when all is well")


def run(args: argparse.Namespace) -> int:
    """Carry out the mode that was chosen; 0 where all is the same, 1 where it is not."""
    _check(args)
    from trainer.load import load

    config = load(args.config, args.overrides)
    # Ends what was started, as Ctrl-C does.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="trainer-verify-"))
    kept = args.keep
    try:
        same = (_resume if args.resume else _parallel)(args, config, folder)
        kept = kept or not same
        return EXIT_DONE if same else EXIT_FAILURE
    except UserError:
        raise
    except TrainerError:
        kept = True
        print_line(f"what was written until then: {folder}")
        raise
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)


def _check(args: argparse.Namespace) -> None:
    if not args.resume and not args.parallel:
        raise UserError(
            "choose what to verify: --resume (kills and resumes) or --parallel (ways to train, side by side)"
        )
    mode, foreign = ("--resume", ONLY_PARALLEL) if args.resume else ("--parallel", ONLY_RESUME)
    for name in foreign:
        if getattr(args, name) is not None:
            raise UserError(f"--{name} has no meaning with {mode}: leave it out")
    smallest = {"steps": 3 if args.resume else 1, "processes": 1 if args.resume else 2, "kills": 1, "seed": 0}
    for name, least in smallest.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name}: got {value}, wanted at least {least}")
    if args.tolerance is not None and not args.tolerance > 0:
        raise UserError(f"--tolerance: got {args.tolerance:g}, wanted more than 0")
    if world.from_environment().launched:
        raise UserError("verify starts its processes by itself: run it without torchrun, with --processes")


def _resume(args: argparse.Namespace, config: RunConfig, folder: Path) -> bool:
    from trainer.verify.resume import KILLS, STEPS, Plan, verify_resume

    plan = Plan(args.steps or STEPS, args.kills or KILLS, args.processes, args.seed)
    verdict = verify_resume(config, plan, folder, print_line, verify.launch)
    if args.json:
        answer = {"mode": "resume", "identical": verdict.identical, **asdict(verdict)}
        answer["hits"] = [{**asdict(hit), "met": hit.met} for hit in verdict.hits]
        print(json.dumps(_plain({**answer, "folder": None if verdict.identical and not args.keep else str(folder)})))
    else:
        rows = _same_rows(verdict) if verdict.identical else _different_rows(verdict)
        rows += [("folder", str(folder))] if args.keep or not verdict.identical else []
        said = "bit-identical" if verdict.identical else "NOT the same"
        kills = f"{len(verdict.hits)} kill{'s' if len(verdict.hits) != 1 else ''}"
        summary_table(rows, f"{config.name}: {said} after {kills}", sys.stdout)
    return verdict.identical


def _same_rows(verdict: Verdict) -> list[tuple[str, str]]:
    met = Counter(phase for hit in verdict.hits for phase in hit.met)
    found = verdict.comparison
    resumed = [str(step) for step in sorted({hit.saved for hit in verdict.hits if hit.saved})]
    return [
        ("kills", ", ".join(f"{count} in {phase}" for phase, count in sorted(met.items())) or "none"),
        ("resumed at step", ", ".join(resumed) or "none: every kill came before a checkpoint; raise --steps"),
        (
            "compared",
            f"{', '.join(found.states)} of {found.checkpoints} checkpoints; {found.entries} entries of metrics",
        ),
    ]


def _different_rows(verdict: Verdict) -> list[tuple[str, str]]:
    found = verdict.comparison
    rows = [("differ from step", str(found.step))]
    if verdict.resumed is not None:
        rows.append(("resumed at step", str(verdict.resumed)))
    if found.state is not None:
        for group in found.state.groups:
            shown = ", ".join(f"{t.name} by {t.largest:.3g}" for t in group.tensors)
            rows.append((group.state, f"{group.differing} of {group.total} at step {found.state.step}: {shown}"))
        if found.state.numbers:
            rows.append(("numbers", f"at step {found.state.step}: {', '.join(found.state.numbers)}"))
    if found.entry is not None:
        entry = found.entry
        rows.append(("metrics", f"step {entry.step}: {entry.key} is {entry.other}, undisturbed {entry.undisturbed}"))
    if verdict.place is not None:
        rows.append(("begins in", shown_place(verdict.place)))
    rows.append(("usual cause", verdict.hint or "unknown"))
    return rows


def _parallel(args: argparse.Namespace, config: RunConfig, folder: Path) -> bool:
    from trainer.verify.parallel import PROCESSES, STEPS, verify_parallel

    done = verify_parallel(
        config, args.steps or STEPS, args.processes or PROCESSES, args.tolerance, folder, print_line, verify.launch
    )
    if args.json:
        answer = {"mode": "parallel", "same": done.is_good, **asdict(done)}
        print(json.dumps(_plain({**answer, "folder": str(folder) if args.keep or not done.is_good else None})))
        return done.is_good
    weights = f", of weights {done.weight_tolerance:.0e}" if done.weight_tolerance != done.tolerance else ""
    print(
        f"{config.name}: {done.steps} steps with a global batch of {done.global_batch}, one process against others; "
        f"largest relative differences, tolerance {done.tolerance:.0e}{weights}"
    )
    lines = [[*_way_cells(done.reference), "-", "-", "-", "reference"], *map(_outcome_line, done.outcomes)]
    print_table(("", "processes", "batch", "accumulate", "losses", "gradients", "weights", ""), lines)
    for text, names in _explanations(done.outcomes).items():
        print(f"{', '.join(names)}: {text}")
    if done.silenced:
        off = ", ".join(f"{count} {kind}" for kind, count in done.silenced.items())
        print(f"switched off, since each rank draws them for itself: {off}")
    if args.keep or not done.is_good:
        print(f"folder: {folder}")
    return done.is_good


def _way_cells(way: Way) -> list[str]:
    return [way.name, str(way.processes), str(way.batch_size), str(way.accumulate)]


def _outcome_line(outcome: Outcome) -> list[str]:
    if outcome.error is not None:
        return [*_way_cells(outcome.way), "-", "-", "-", "did not run"]
    values = (outcome.losses, outcome.gradients, outcome.weights)
    return [*_way_cells(outcome.way), *(f"{value:.1e}" for value in values), "same" if outcome.is_good else "DIFFERS"]


def _explanations(outcomes: list[Outcome]) -> dict[str, list[str]]:
    """What there is to say -> the names of those of which it is true."""
    found: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.error is not None:
            found.setdefault(f"did not run: {outcome.error}", []).append(outcome.way.name)
        elif outcome.place is not None:
            text = f"begins to differ in {shown_place(outcome.place)}: {outcome.hint}"
            found.setdefault(text, []).append(outcome.way.name)
    return found


def shown_place(place: Place) -> str:
    """Where a difference begins, in one line."""
    kind = f" ({place.kind})" if place.kind else ""
    sample = f", most for sample {place.sample}" if place.sample is not None else ""
    by = f", by {place.difference:.2g}" if place.difference != float("inf") else ""
    return f"{place.stage} {place.name}{kind}{sample}{by}"


def _plain(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: they become text."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not abs(value) < float("inf") else value

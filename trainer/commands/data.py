"""Look at the data of a config as its model would see them.

trainer data preview --config FILE                              three samples, lengths, what is cut off or left out
trainer data preview --config FILE --split val --num 10 data.val_fraction=0.05
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator

from trainer.cli import add_config_arguments
from trainer.errors import EXIT_DONE, UserError
from trainer.task import Preview, PreviewSample

DIM, PLAIN = "\033[2m", "\033[0m"
"""SGR codes of a terminal: faint, and back to normal."""
MARKS = {True: ">", False: "."}
"""Begins a line whose tokens the loss counts, or does not."""
BREAK = "⏎"
"""A line break of the text; other ends of lines are only where the mark changes."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("action", choices=["preview"], metavar="preview", help="show samples of a split")
    add_config_arguments(parser)
    parser.add_argument("--split", choices=["train", "val", "test"], default="train", help="which one (train)")
    parser.add_argument("--num", type=int, default=3, metavar="N", help="samples to show (3)")


def run(args: argparse.Namespace) -> int:
    """Print samples and facts of one split; neither weights nor an accelerator are needed."""
    if args.num < 0:
        raise UserError(f"--num {args.num}: wanted 0 or more")
    from trainer.assembly import build_data
    from trainer.load import load

    config = load(args.config, args.overrides)
    data = build_data(config)
    found: Preview = config.recipe.call(
        "preview", data=data, init_from=config.init_from, split=args.split, num=args.num, seed=config.seed
    )
    if args.json:
        print(json.dumps({**found.facts, "samples": [_plain(sample) for sample in found.samples]}))
        return EXIT_DONE
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for sample in found.samples:
        print("\n".join([*_shown(sample, colour), ""]))
    for line in found.lines:
        print(_printable(line))
    return EXIT_DONE


def _plain(sample: PreviewSample) -> dict[str, object]:
    pieces = [{"text": text, "target": is_target} for text, is_target in sample.pieces]
    return {"place": sample.place, "tokens": sample.tokens, "targets": sample.targets, "pieces": pieces}


def _shown(sample: PreviewSample, colour: bool) -> Iterator[str]:
    yield _printable(
        f"{sample.place}: {sample.tokens:,} tokens, {sample.targets:,} of them targets "
        f"({MARKS[True]} counts in the loss, {MARKS[False]} does not)"
    )
    for text, is_target in sample.pieces:
        lines = text.split("\n")
        ends = [BREAK] * (len(lines) - 1) + [""]
        for line, end in zip(lines, ends, strict=True):
            if line or end:
                shown = f"{MARKS[is_target]} {_printable(line)}{end}"
                yield f"{DIM}{shown}{PLAIN}" if colour and not is_target else shown


def _printable(text: str) -> str:
    """What a file holds reaches the terminal, so no control characters."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)

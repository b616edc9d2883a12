"""The command line: `trainer VERB [options]`. Verbs are the files of `trainer/commands/`; only the chosen one is
imported, and nothing here needs more than the standard library.

A verb's module has a docstring (its first line is the help), `configure(parser)` and `run(args) -> int`.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import trainer
from serving.errors import ServingError
from trainer.errors import EXIT_DONE, EXIT_FAILURE, EXIT_USER, ConfigError, Followed, Preempted, TrainerError, UserError

COMMANDS = Path(__file__).parent / "commands"
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return its exit code; prints errors, never raises one."""
    argv = sys.argv[1:] if argv is None else argv
    own = argv[: argv.index("--")] if "--" in argv else argv
    debug, as_json = "--debug" in own, "--json" in own
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("trainer: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python would flush stdout once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except Exception as error:
        return report(error, as_json, debug)


def report(error: BaseException, as_json: bool, debug: bool) -> int:
    """Print an error, unless it has been printed before; returns the exit code that goes with it."""
    if not getattr(error, "was_reported", False):
        error.was_reported = True  # type: ignore[attr-defined]
        try:
            _print_error(error, as_json, debug)
        except OSError:
            # The disk of the log is full: nobody can be told here (run.json says it). Python would try again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    return error.exit_code if isinstance(error, TrainerError | ServingError) else EXIT_FAILURE


def add_config_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add `--config FILE` and any number of `key=value` overrides, as `args.config` and `args.overrides`."""
    parser.add_argument(
        "--config", metavar="FILE", required=required, help="a YAML file, or the name of a config that ships"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="change one value of the config, e.g. optimizer.lr=0.1 (`trainer list` shows the keys)",
    )
    parser.set_defaults(takes_overrides=True)


def verbs() -> dict[str, str]:
    """Verb -> its help, read without importing it, sorted."""
    paths = sorted(path for path in COMMANDS.glob("*.py") if not path.name.startswith("_"))
    return {path.stem.replace("_", "-"): _first_line(path) for path in paths}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (`{self.prog} --help` shows the usage)")


def _dispatch(argv: Sequence[str]) -> int:
    if not argv:
        print(_help(), file=sys.stderr)
        return EXIT_USER
    verb, *rest = argv
    if verb in ("-h", "--help", "help"):
        print(_help())
        return EXIT_DONE
    if verb in ("-V", "--version"):
        print(f"trainer {trainer.__version__}")
        return EXIT_DONE
    path = COMMANDS / f"{verb.replace('-', '_')}.py"
    if "_" in verb or not verb.replace("-", "").isalnum() or not path.is_file():
        raise UserError(_unknown_verb(verb))
    module = importlib.import_module(f"trainer.commands.{path.stem}")
    parser = _Parser(
        prog=f"trainer {verb}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.configure(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on stdout, everything else on stderr"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    try:
        # Overrides may stand before, between and after options.
        mixed = parser.get_default("takes_overrides")
        args = parser.parse_intermixed_args(rest) if mixed else parser.parse_args(rest)
    except SystemExit as error:  # --help
        return error.code if isinstance(error.code, int) else EXIT_DONE
    for text in getattr(args, "overrides", ()):
        if "=" not in text:
            raise UserError(f"{text!r} has no `=`: write a config as --config FILE, a value as key=value")
    code: int = module.run(args)
    return code


def _unknown_verb(verb: str) -> str:
    import difflib

    close = difflib.get_close_matches(verb, list(verbs()), n=1)
    hint = f", did you mean {close[0]!r}?" if close else ""
    return f"unknown verb {verb!r}{hint}; there are: {', '.join(verbs())}"


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_bytes())) or "").partition("\n")[0]


def _help() -> str:
    listed = verbs()
    width = max((len(verb) for verb in listed), default=0)
    lines = [f"  {verb:<{width}}  {text}" for verb, text in listed.items()]
    return "\n".join(
        [
            "usage: trainer VERB [--config FILE] [key=value ...] [--json] [--debug]",
            "",
            "Turns one YAML file into a training job.",
            "",
            *lines,
            "",
            "`trainer VERB --help` shows a verb's options, `trainer list` the parts a config can name.",
            "Exit codes: 0 done, 1 failure, 2 a mistake in what was asked for, 75 preempted with a checkpoint written.",
        ]
    )


def _print_error(error: BaseException, as_json: bool, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    if isinstance(error, TrainerError | ServingError):
        _report(error, as_json)
    else:
        _report_failure(error, as_json, debug)


def _report(error: TrainerError | ServingError, as_json: bool) -> None:
    problems = error.problems if isinstance(error, ConfigError) else []
    label = "preempted" if isinstance(error, Preempted) else "error"
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        if isinstance(error, ConfigError | Preempted | Followed):
            return  # rank 0 says it
        label, as_json = f"{label} on rank {rank}", False
    for line in [str(problem) for problem in problems] or [str(error)]:
        print(f"trainer: {label}: {_one_line(line)}", file=sys.stderr)
    if len(problems) > 1:
        print(f"trainer: {len(problems)} problems in the config, nothing was started", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": str(error), "problems": [vars(problem) for problem in problems]}), flush=True)


def _one_line(text: str) -> str:
    # What a user's file holds may reach the terminal, so no control characters.
    text = " ".join(text.split())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _report_failure(error: BaseException, as_json: bool, debug: bool) -> None:
    text = _one_line(str(error))
    message = f"{type(error).__name__}: {text}" if text else type(error).__name__
    hint = "" if debug else " (--debug shows the traceback)"
    rank = os.environ.get("RANK", "0")
    where = f" on rank {rank}" if rank != "0" else ""
    print(f"trainer: failed{where}: {message}{hint}", file=sys.stderr, flush=True)
    if as_json and rank == "0":
        print(json.dumps({"error": message, "problems": []}), flush=True)

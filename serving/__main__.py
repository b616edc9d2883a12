"""`python -m serving BUNDLE ...`: what `trainer serve` starts. Needs neither `trainer` nor `recipes`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import NoReturn

from serving import options
from serving.errors import Mistake, ServingError

EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Mistake(f"{message} (`{self.prog} --help` shows the usage)")


def main(argv: list[str] | None = None) -> int:
    """Serve until told to stop; returns the exit code, and prints errors as one line."""
    argv = sys.argv[1:] if argv is None else argv
    own = argv[: argv.index("--")] if "--" in argv else argv
    debug, as_json = "--debug" in own, "--json" in own
    try:
        return _serve(argv)
    except KeyboardInterrupt:
        print("trainer: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except Exception as error:
        if debug:
            import traceback

            traceback.print_exception(error)
        is_told = isinstance(error, ServingError)
        text = " ".join(str(error).split())
        text = text if is_told else f"{type(error).__name__}: {text}" + ("" if debug else " (--debug: the traceback)")
        print(f"trainer: {'error' if is_told else 'failed'}: {text}", file=sys.stderr, flush=True)
        if as_json:
            print(json.dumps({"error": text}), flush=True)
        return error.exit_code if isinstance(error, ServingError) else EXIT_FAILURE


def _serve(argv: list[str]) -> int:
    parser = _Parser(prog="trainer serve", description="Serve bundles over HTTP.", allow_abbrev=False)
    options.configure(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout when ready")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    try:
        args = parser.parse_args(argv)
    except SystemExit as error:  # --help
        return error.code if isinstance(error.code, int) else 0
    options.check(args)
    from serving.front import server

    return server.serve(args)


if __name__ == "__main__":
    sys.exit(main())

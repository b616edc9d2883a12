"""Is a bundle what was exported, and does it answer here as in training? python -m serving.deploy.check BUNDLE."""

from __future__ import annotations

import argparse
import json
import sys

from serving.bundle import Bundle
from serving.errors import ServingError


def main(arguments: list[str]) -> int:
    """0 where all hashes agree and the golden requests are answered within tolerance; else 1 or 2. One JSON line."""
    parser = argparse.ArgumentParser(prog="python -m serving.deploy.check", description=__doc__)
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("--hashes-only", action="store_true", help="run nothing: needs no package but Python itself")
    args = parser.parse_args(arguments)
    try:
        bundle = Bundle.read(args.bundle)
        bundle.verify()
        found = {"name": bundle.name, "version": bundle.version}
        if args.hashes_only:
            print(json.dumps({**found, "ok": True}))
            return 0
        from serving.predictor import Predictor

        replay = Predictor.open(bundle).replay()
    except ServingError as error:
        print(f"trainer: error: {error}", file=sys.stderr)
        return error.exit_code
    answers = {"golden": replay.count, "deviation": replay.deviation, "tolerance": replay.tolerance}
    print(json.dumps({**found, "ok": replay.ok, **answers}))
    return 0 if replay.ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Is a bundle what was exported, and does it answer here as in training? python -m serving.deploy.check BUNDLE."""

from __future__ import annotations

import json
import sys

from serving.bundle import Bundle
from serving.errors import ServingError


def main(arguments: list[str]) -> int:
    """0 where all hashes agree and the golden requests are answered within tolerance; else 1 or 2. One JSON line."""
    if len(arguments) != 1:
        print("usage: python -m serving.deploy.check BUNDLE", file=sys.stderr)
        return 2
    try:
        bundle = Bundle.read(arguments[0])
        bundle.verify()
        from serving.predictor import Predictor

        replay = Predictor.open(bundle).replay()
    except ServingError as error:
        print(f"trainer: error: {error}", file=sys.stderr)
        return error.exit_code
    found = {
        "name": bundle.name,
        "version": bundle.version,
        "ok": replay.ok,
        "golden": replay.count,
        "deviation": replay.deviation,
        "tolerance": replay.tolerance,
    }
    print(json.dumps(found))
    return 0 if replay.ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

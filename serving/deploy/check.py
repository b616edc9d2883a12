"""Is a bundle what was exported, and does it answer here as in training? python -m serving.deploy.check BUNDLE."""

from __future__ import annotations

import argparse
import json
import os
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
        deviation, count = _replay(bundle)
    except ServingError as error:
        print(f"trainer: error: {error}", file=sys.stderr)
        return error.exit_code
    tolerance = bundle.golden.tolerance
    ok = count > 0 and deviation <= tolerance  # NaN is not
    print(json.dumps({**found, "ok": ok, "golden": count, "deviation": deviation, "tolerance": tolerance}))
    return 0 if ok else 1


def _replay(bundle: Bundle) -> tuple[float, int]:
    """Largest deviation, and the number of golden requests; a language model raises ServingError beyond tolerance."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if bundle.program.runtime == "transformers":
        from serving.language.messages import Load
        from serving.language.settings import LanguageSettings
        from serving.language.worker import open_bundle

        usual = LanguageSettings()
        load = Load(str(bundle.path), bundle.version, threads, "auto", usual.max_rows, usual.kv_tokens, usual.chunk)
        _, _, ready = open_bundle(load)
        return ready.deviation, ready.count
    from serving.predictor import Predictor

    replay = Predictor.open(bundle, threads).replay()
    return replay.deviation, replay.count


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

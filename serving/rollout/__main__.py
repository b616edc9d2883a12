"""`python -m serving.rollout DIRECTORY [SETTINGS]`: the front of a deployment, as `trainer deploy run` starts it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from serving.errors import ServingError
from serving.rollout.front import Settings, run
from serving.rollout.state import StateDirectory
from serving.rollout.strict import build

USAGE = 'usage: python -m serving.rollout DIRECTORY [\'{"source": BUNDLE, "port": 8000, ...}\']'


def main(argv: list[str] | None = None) -> int:
    """Run the front and return its exit code; prints errors, never raises one of ours."""
    argv = sys.argv[1:] if argv is None else argv
    if not 1 <= len(argv) <= 2 or argv[0] in ("-h", "--help"):
        print(USAGE, file=sys.stderr)
        return 2
    try:
        given = build(Settings, json.loads(argv[1]), "settings") if len(argv) > 1 else None
        return run(StateDirectory(Path(argv[0]).absolute()), given)
    except ServingError as error:
        print(f"trainer: error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())

"""A bundle opened as a server opens it: in a new process, which has never heard of the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from trainer.errors import TrainerError

TIMEOUT = 600.0
"""Seconds."""
_OPEN = """
import json, sys
from serving.bundle import Bundle
from serving.predictor import Predictor
bundle = Bundle.read(sys.argv[1])
bundle.verify()
replay = Predictor.open(bundle).replay()
foreign = sorted({name.partition(".")[0] for name in sys.modules} & {"trainer", "recipes", "lightning"})
print(json.dumps({"ok": replay.ok, "count": replay.count, "deviation": str(replay.deviation), "foreign": foreign}))
"""


def prove(folder: Path) -> dict[str, Any]:
    """Read, verify and replay a bundle in a process of its own. Raises TrainerError where that fails."""
    root = str(Path(__file__).parents[2])  # where `serving` lies
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path[1:]])}
    command = [sys.executable, "-P", "-c", _OPEN, str(folder)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise TrainerError(f"the bundle was not open after {TIMEOUT:.0f} s, so nothing was written") from error
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
        raise TrainerError(f"a new process can't open the bundle, so nothing was written: {last}")
    found: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
    if not found["ok"] or found["foreign"]:
        raise TrainerError(
            f"a new process answers the golden requests otherwise (deviation {found['deviation']}, "
            f"imports {found['foreign']}), so nothing was written"
        )
    return found

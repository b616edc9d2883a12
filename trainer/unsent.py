"""Runs that ended with something unsent, or whose end MLflow was never told: a node died, a server was away.

The next training beside them finishes them in the background (its mirror, see `finish_others`), and so does
`trainer runs sync`.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from trainer.contact import Contact
from trainer.files import locked
from trainer.lineage import without_password
from trainer.mirrored import MirroredRun
from trainer.run import DAMAGED, RUNNING, Run, find_runs
from trainer.sending import Mirror, log, one_line
from trainer.tracking import DONE, MIRROR_LOCK, read_state

LOOK_AT = 500
"""Newest runs that a training looks at."""
LOOKS_PER_SLICE = 50
FINISH_AT_MOST = 20
OTHERS_SECONDS = 120.0
"""For all other runs together."""
SLICE_SECONDS = 0.5
"""For which another run is sent before it is the own run's turn again."""


def is_unsent(run: Run) -> bool:
    """Whether the run has ended, as far as this host can tell, and MLflow doesn't have all of it.

    A run that never was mirrored counts where its config wants it to be.
    """
    if run.status in (RUNNING, DAMAGED):
        return False
    state = read_state(run.path)
    return state.get("state") != DONE if state else bool(_tracking_of(run).get("enabled"))


def finish_others(mine: Run, order: dict[str, Any], contact: Contact) -> Generator[None]:
    """Send the rest of other runs of the same folder to the same address, one at a time, newest first.

    Each `next` takes about `SLICE_SECONDS`; the number of runs and the time for all of them are bounded. A run whose
    own mirror is at work is left to it, and so is one that fails.
    """
    deadline = time.monotonic() + OTHERS_SECONDS
    tried = 0
    for number, run in enumerate(islice(find_runs(mine.path.parent.parent), LOOK_AT), start=1):
        if time.monotonic() > deadline or tried == FINISH_AT_MOST:
            return
        if run.path.name != mine.path.name and _goes_to(run, order["uri"]) and is_unsent(run):
            tried += 1
            try:
                with locked(run.path / MIRROR_LOCK, 0):
                    yield from _finish(run, order, contact, deadline)
            except Exception as error:  # its lock may be held, its files damaged: its own matter, not this run's
                log(f"{run.path} is left as it is: {one_line(error)}")
        elif number % LOOKS_PER_SLICE == 0:
            yield


def _finish(run: Run, order: dict[str, Any], contact: Contact, deadline: float) -> Generator[None]:
    status = run.status
    if not is_unsent(run):  # no longer, now that its lock is held
        return
    experiment = read_state(run.path)["experiment"]
    tags = _tracking_of(run).get("tags") or {}
    mirror = Mirror(MirroredRun(run), {**order, "experiment": experiment, "tags": tags, "is_over": True}, contact)
    is_done = False
    while not is_done and mirror.failures == 0 and time.monotonic() < deadline and run.status == status:
        is_done = mirror.send(time.monotonic() + SLICE_SECONDS, status)
        yield
    if run.status == status:  # and nobody goes on with it meanwhile
        mirror.close(is_done, "no time was left")
        log(f"{run.path}: {'all is in MLflow' if is_done else 'not all was sent'}, status {status}")


def _goes_to(run: Run, uri: str) -> bool:
    return bool(read_state(run.path).get("uri") == without_password(uri))


def _tracking_of(run: Run) -> dict[str, Any]:
    """The section `tracking` of the resolved config, which has every key; read without the components it names."""
    try:
        config = yaml.safe_load(Path(run.path / "config.yaml").read_bytes())
        return dict(config["tracking"])
    except (OSError, yaml.YAMLError, TypeError, KeyError):  # damaged: `trainer runs` says so
        return {}

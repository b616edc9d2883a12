"""MLflow from the training process: starts the mirror, tells it how the run ended, and never waits for it in a step.

`metrics.jsonl` is the truth. `python -m trainer.mirror` is a process of its own that follows it and sends it
on, so that neither the import of mlflow (2 s of CPU) nor a slow database or server ever holds the training.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote, urlsplit

from trainer import environment
from trainer.errors import UserError
from trainer.files import write_atomically
from trainer.lineage import without_password
from trainer.mirror_process import LOG_FILE, MirrorProcess
from trainer.run import RUNNING

if TYPE_CHECKING:
    from trainer.config import Tracking

STATE_FILE = "tracking.json"
MIRROR_LOCK = ".mirror.lock"
DONE, INCOMPLETE = "done", "incomplete"
"""How a mirror may have ended, in `tracking.json`."""
SEARCH = "search"
"""Kind of what is mirrored, in the order to the mirror; a run where there is none."""

MLFLOW_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "OMP_NUM_THREADS": "1",
}
"""Environment in which mlflow is imported: no telemetry, no long waits inside of a call. What the user set stays."""
MIRROR_ENVIRONMENT = {
    **MLFLOW_ENVIRONMENT,
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # it tries again itself, and must hear what was answered
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # it tells errors itself, once; MLflow tells each with fifty lines of traceback
}
"""The same for the mirror."""

SILENT_SECONDS = 2.0
"""A longer wait for the mirror is told to the user."""
HEARD_SECONDS = 10.0
"""A mirror that hasn't heard the final word after this long is held up (suspended, swapped out): it is given up."""
WAIT_MARGIN = 3.0
"""Seconds that the mirror gets on top of its own deadline to write down what was left."""


class Followed(Protocol):
    """What a mirror can follow: a run directory, or a search's."""

    path: Path

    @property
    def record(self) -> dict[str, Any]:
        """What it says about itself; `name` is that of the experiment."""

    @property
    def status(self) -> str:
        """`running`, or how it has ended, as far as this host can tell."""


class Tracker:
    """The mirror of one run, seen from the training process (rank 0). All methods return within microseconds,
    but for `finish`.

    A mirror that dies while the training goes on (the kernel may choose it when memory is short) is started again,
    `mirror_process.RESTARTS` times at most, and goes on where `tracking.json` says; when it dies once more, `finish`
    says so. What it hadn't sent is in `metrics.jsonl` in any case.
    """

    work = "the training"
    """What goes on although MLflow takes nothing."""

    def __init__(self, run: Followed, tracking: Tracking, say: Callable[[str], None] | None = None) -> None:
        """`say` is told once, from another thread, when MLflow takes nothing while the training goes on.

        Raises UserError when `tracking.uri` is of a kind that MLflow doesn't take.
        """
        self._run = run
        self._tracking = tracking
        self._say = say
        self.uri = tracking_uri(tracking, run.path.parent.parent)
        self._mirror: MirrorProcess | None = None

    def start(self) -> None:
        """Start the mirror. Never raises: one line on stderr says when it could not be started."""
        if not self._tracking.enabled:
            return
        try:
            self._mirror = MirrorProcess(self._run.path, self._order(), _mirror_environment(), self._problem_begins)
        except OSError as error:
            print(f"warning: MLflow is not mirrored: {error}", file=sys.stderr)

    def problem(self) -> str | None:
        """What keeps the mirror from sending right now, in one line; None when nothing does."""
        return self._mirror.problem if self._mirror is not None else read_state(self._run.path).get("last_error")

    def finish(self, status: str, wait_seconds: float = 30, is_patient: bool = False) -> str | None:
        """Have the rest sent, and the MLflow run ended with this status of the run.

        Call it after `Run.end_attempt`. Waits, at most `wait_seconds`, while sending makes progress; where the server
        is down or silent it waits no more than about a second, unless `is_patient`. Returns a one-line warning when
        something was left unsent, or None.
        """
        if self._mirror is None:
            return "MLflow: nothing was mirrored" if self._tracking.enabled else None
        spare = wait_seconds if is_patient else 0.0
        self._mirror.finish({"final": status, "drain_seconds": wait_seconds, "spare_seconds": spare})
        if not self._await(wait_seconds + WAIT_MARGIN):
            self._mirror.kill()
            self._give_up()
        ended, self._mirror = self._mirror.ended, None
        return unsent(self._run.path, ended)

    def _await(self, seconds: float) -> bool:
        assert self._mirror is not None
        began = time.monotonic()
        if self._mirror.wait(min(SILENT_SECONDS, seconds)):
            return True
        print(f"sending the rest to MLflow (at most {seconds:.0f} s) ...", file=sys.stderr, flush=True)
        if not self._mirror.wait(min(HEARD_SECONDS, seconds) - SILENT_SECONDS) and not self._mirror.has_heard:
            return False
        return self._mirror.wait(began + seconds - time.monotonic())

    def _give_up(self) -> None:
        state = {**read_state(self._run.path), "state": INCOMPLETE, "last_error": "no answer in time"}
        try:
            write_atomically(self._run.path / STATE_FILE, json.dumps(state, indent=1).encode())
        except OSError as error:  # a full disk: what it holds doesn't say `done`, either
            print(f"warning: {self._run.path / STATE_FILE} can't be written: {error}", file=sys.stderr)

    def _problem_begins(self, problem: str) -> None:
        if self._say is not None:
            self._say(f"MLflow takes nothing ({problem}); {self.work} goes on, and sends it later")

    def _order(self) -> dict[str, Any]:
        record = self._run.record
        pid = os.getpid()
        return {
            "uri": self.uri,
            "experiment": self._tracking.experiment or record["name"],
            "tags": self._tracking.tags,
            "system_metrics": self._tracking.system_metrics,
            "is_over": self._run.status != RUNNING,
            "pid": pid,
            "process_started": environment.process_started(pid),
        }


def tracking_uri(tracking: Tracking, runs_dir: str | Path) -> str:
    """Where the run is mirrored to: `tracking.uri`, else `MLFLOW_TRACKING_URI`, else `<runs_dir>/mlflow.db`.

    Raises UserError for a folder: MLflow's file store is gone since 3.13.
    """
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(runs_dir).resolve() / 'mlflow.db'}"
    if is_folder(uri):
        raise UserError(f"tracking.uri: {folder_refused(uri)}")
    return uri


def is_folder(uri: str) -> bool:
    """Whether MLflow would take the address for a folder, where it keeps no runs since 3.13."""
    scheme = urlsplit(uri).scheme
    return scheme == "file" or (not scheme and not uri.startswith("databricks"))


def folder_refused(uri: str) -> str:
    """Why such an address is refused, and what to give."""
    return (
        f"{uri!r} is a folder, and MLflow keeps no runs in folders any more; "
        "give sqlite:///PATH/mlflow.db or the http(s):// address of a server"
    )


def sqlite_path(uri: str) -> Path | None:
    """The file of a `sqlite:///...` address; None for any other."""
    prefix = "sqlite:///"
    return Path(unquote(uri.removeprefix(prefix).partition("?")[0])) if uri.startswith(prefix) else None


def mlflow_command(uri: str) -> str:
    """What a user types (a server: opens in the browser) to look at the runs at this address."""
    if urlsplit(uri).scheme in ("http", "https"):
        return without_password(uri)
    program = "mlflow" if shutil.which("mlflow") else f"{shlex.quote(sys.executable)} -m mlflow"
    return f"{program} ui --backend-store-uri {shlex.quote(without_password(uri))}"


def read_state(run_path: Path) -> dict[str, Any]:
    """How far the mirror has come (`tracking.json`); empty when it never wrote that down."""
    try:
        state = json.loads((run_path / STATE_FILE).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def unsent(run_path: Path, ended: dict[str, Any] | None = None) -> str | None:
    """One line about what the mirror left unsent, or what MLflow refused; None when it has all.

    `ended` is what the mirror told at its end, which a full disk may have kept from `tracking.json`.
    """
    state = {**read_state(run_path), **(ended or {})}
    if state.get("state") == DONE:
        if not state.get("refused"):
            return None
        return (
            f"MLflow refused {state['refused']} values of {', '.join(state['refused_names'])}; metrics.jsonl has them"
        )
    reason = state.get("last_error") or f"see {run_path / LOG_FILE}"
    left = f"{state['pending']} values were not sent" if state.get("pending") else "not all was sent"
    return f"MLflow: {left} ({reason}); send the rest with: trainer runs sync {run_path}"


def _mirror_environment() -> dict[str, str]:
    variables = {**MLFLOW_ENVIRONMENT, **os.environ}
    home = Path(__file__).resolve().parents[1]
    if home.name not in ("site-packages", "dist-packages"):
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(home), os.environ.get("PYTHONPATH")]))
    return variables

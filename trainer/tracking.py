"""MLflow from the training process: starts the mirror, tells it how the run ended, and never waits for it in a step.

`metrics.jsonl` is the truth. `python -m trainer.mirror` is a process of its own that follows it and sends it
on, so that neither the import of mlflow (2 s of CPU) nor a slow database or server ever holds the training.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from trainer import environment
from trainer.errors import UserError
from trainer.files import write_atomically
from trainer.lineage import without_password

if TYPE_CHECKING:
    from trainer.config import Tracking
    from trainer.run import Run

STATE_FILE = "tracking.json"
LOG_FILE = "mirror.log"

MLFLOW_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the mirror has its own patience, and must hear the final word
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "OMP_NUM_THREADS": "1",
}
"""Environment in which mlflow is imported: no telemetry, no long waits inside of a call. What the user set stays."""

SILENT_SECONDS = 2.0
"""A longer wait for the mirror is told to the user."""
WAIT_MARGIN = 3.0
"""Seconds that the mirror gets on top of its own deadline to write down what was left."""


class Tracker:
    """The mirror of one run, seen from the training process (rank 0). All methods return within microseconds,
    but for `finish`."""

    def __init__(self, run: Run, tracking: Tracking) -> None:
        """Raises UserError when `tracking.uri` is of a kind that MLflow doesn't take."""
        self._run = run
        self._tracking = tracking
        self.uri = tracking_uri(tracking, run.path.parent.parent)
        self._mirror: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the mirror. Never raises: one line on stderr says when it could not be started."""
        if not self._tracking.enabled:
            return
        try:
            with (self._run.path / LOG_FILE).open("ab") as log:
                self._mirror = subprocess.Popen(
                    [sys.executable, "-m", "trainer.mirror", str(self._run.path), str(os.getpid())],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=_mirror_environment(),
                    start_new_session=True,  # Ctrl-C goes to the terminal's whole process group
                )
            self._tell(self._order())
        except OSError as error:
            print(f"warning: MLflow is not mirrored: {error}", file=sys.stderr)

    def problem(self) -> str | None:
        """What keeps the mirror from sending right now, in one line; None when nothing does."""
        return read_state(self._run.path).get("last_error")

    def finish(self, status: str, wait_seconds: float = 30) -> str | None:
        """Have the rest sent, and the MLflow run ended with this status of the run.

        Call it after `Run.end_attempt`. Waits until all is sent, at most `wait_seconds`. Returns a one-line
        warning when something was left unsent, or None.
        """
        if self._mirror is None:
            return "MLflow: nothing was mirrored" if self._tracking.enabled else None
        try:
            self._tell({"final": status, "drain_seconds": wait_seconds})
            assert self._mirror.stdin is not None
            self._mirror.stdin.close()
        except BrokenPipeError:
            pass  # it is dead: its state, read below, tells how far it came
        try:
            self._await(wait_seconds + WAIT_MARGIN)
        except subprocess.TimeoutExpired:
            self._mirror.kill()
            self._mirror.wait()
            state = {**read_state(self._run.path), "state": "incomplete", "last_error": "no answer in time"}
            write_atomically(self._run.path / STATE_FILE, json.dumps(state, indent=1).encode())
        self._mirror = None
        return unsent(self._run.path)

    def _await(self, seconds: float) -> None:
        assert self._mirror is not None
        try:
            self._mirror.wait(min(SILENT_SECONDS, seconds))
        except subprocess.TimeoutExpired:
            print(f"sending the rest to MLflow (at most {seconds:.0f} s) ...", file=sys.stderr, flush=True)
            self._mirror.wait(max(seconds - SILENT_SECONDS, 0))

    def _order(self) -> dict[str, Any]:
        record = self._run.record
        pid = os.getpid()
        return {
            "uri": self.uri,
            "experiment": self._tracking.experiment or record["name"],
            "tags": self._tracking.tags,
            "system_metrics": self._tracking.system_metrics,
            "pid": pid,
            "process_started": environment.process_started(pid),
        }

    def _tell(self, word: dict[str, Any]) -> None:
        assert self._mirror is not None and self._mirror.stdin is not None
        self._mirror.stdin.write(f"{json.dumps(word)}\n".encode())
        self._mirror.stdin.flush()


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


def unsent(run_path: Path) -> str | None:
    """One line about what the mirror left unsent, None when it sent all."""
    state = read_state(run_path)
    if state.get("state") == "done":
        return None
    reason = state.get("last_error") or f"see {run_path / LOG_FILE}"
    left = f"{state['pending']} values were not sent" if state.get("pending") else "not all was sent"
    return f"MLflow: {left} ({reason}); send the rest with: trainer runs sync {run_path}"


def _mirror_environment() -> dict[str, str]:
    variables = {**MLFLOW_ENVIRONMENT, **os.environ}
    home = Path(__file__).resolve().parents[1]
    if home.name not in ("site-packages", "dist-packages"):
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(home), os.environ.get("PYTHONPATH")]))
    return variables

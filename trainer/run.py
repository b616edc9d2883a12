"""The run directory: config, record and metrics of one run, and nothing that has to be unpickled.

`<runs_dir>/<name>/<run_id>/` holds `config.yaml` (resolved, runs again as it is), `run.json` (the record),
`metrics.jsonl` (one object per logged step, the source of truth), `environment.txt`, `git.diff` where the
work tree was dirty, `checkpoints/` and `artifacts/`.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import environment
from trainer.errors import UserError
from trainer.files import FULL, locked, reason, write_atomically, write_with_reserve
from trainer.lineage import Git, lineage, read_git
from trainer.metrics_log import MetricsLog
from trainer.run_lock import RunLock, still_at_work

if TYPE_CHECKING:
    from trainer.config import RunConfig

FORMAT_VERSION = 1
DISTRIBUTION = "yaml-trainer"

RUNNING = "running"
FINISHED = "finished"
STOPPED = "stopped"
"""Judged to be not worth going on with, as a trial of a search is: a normal end before the last step."""
PREEMPTED = "preempted"
FAILED = "failed"
KILLED = "killed"
"""A run that says `running` but whose process is gone from this host."""
DAMAGED = "damaged"
"""A folder whose record can't be read; never written."""

RESERVE = ".reserve"
RESERVE_BYTES = 64 << 10
"""Enough for a record of some hundred attempts."""


_surroundings: tuple[dict[str, str], Git | None] | None = None


def look_around() -> None:
    """Look at the installed packages and at git now, for all runs that this process, and those it forks, will make.

    That is the truth for them: their code is what was imported here.
    """
    global _surroundings
    _surroundings = environment.distributions(), read_git(Path.cwd())


class Run:
    """One run directory. Made by `create` (once, on rank 0) or `open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock: RunLock | None = None
        """Held by the process that works on the run, from `resume.begin` to `end_attempt`."""
        self._metrics = MetricsLog(path / "metrics.jsonl")

    @classmethod
    def create(cls, config: RunConfig, world_size: int, data_fingerprint: str) -> Run:
        """Make `<runs_dir>/<name>/<run_id>/`, with `config.yaml` as the first thing in it.

        Raises UserError when the folder can't be made.
        """
        run = cls(_make_folder(Path(config.runs_dir) / config.name))
        try:
            run._fill(config, world_size, data_fingerprint)
        except OSError:  # half of a run directory is of no use
            shutil.rmtree(run.path, ignore_errors=True)
            raise
        return run

    def _fill(self, config: RunConfig, world_size: int, data_fingerprint: str) -> None:
        from trainer.load import as_dict, dump

        write_atomically(self.path / "config.yaml", dump(config).encode())
        installed, git = _surroundings or (environment.distributions(), read_git(Path.cwd()))
        listing = "".join(f"{name}=={version}\n" for name, version in installed.items())
        write_atomically(self.path / "environment.txt", listing.encode())
        if git and git.diff:
            write_atomically(self.path / "git.diff", git.diff.encode())
        attempt = _new_attempt(world_size)
        self._lay_reserve()
        self._write(
            {
                "format_version": FORMAT_VERSION,
                "name": config.name,
                "run_id": self.path.name,
                "created": attempt["started"],
                "updated": attempt["started"],
                **_running(attempt),
                "attempts": [attempt],
                "git": git.record() if git else None,
                "versions": environment.versions(installed),
                "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
                "lineage": lineage(
                    as_dict(config),
                    git,
                    data_fingerprint,
                    installed.get(DISTRIBUTION, ""),
                ),
                "mlflow_run_id": None,
            }
        )

    @classmethod
    def open(cls, path: str | Path, runs_dir: str | Path = "runs") -> Run:
        """The run at `path`: its folder, the `config.yaml` in it, or a run id (or its beginning) under `runs_dir`.

        Raises UserError when that is no run, or several.
        """
        folder = Path(path)
        if folder.name == "config.yaml" and folder.is_file():
            folder = folder.parent
        if not folder.exists() and len(folder.parts) == 1:
            folder = _by_id(str(path), Path(runs_dir))
        run = cls(folder)
        if not (folder / "run.json").is_file():
            raise UserError(_no_run(folder))
        _ = run.record
        return run

    @property
    def id(self) -> str:
        """The run id: the name of the folder."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints (`step-XXXXXXXX/`); made by the first."""
        return self.path / "checkpoints"

    @property
    def artifacts(self) -> Path:
        """Folder of pictures and tables, all of which go to MLflow too; made here."""
        folder = self.path / "artifacts"
        folder.mkdir(exist_ok=True)
        return folder

    @property
    def record(self) -> dict[str, Any]:
        """What `run.json` says now. Raises UserError when it is damaged or of a newer format."""
        file = self.path / "run.json"
        try:
            record = json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read ({error}); this run directory is damaged") from error
        if not isinstance(record, dict) or not isinstance(record.get("format_version"), int):
            raise UserError(f"{file}: not the record of a run; this run directory is damaged")
        if record["format_version"] > FORMAT_VERSION:
            raise UserError(
                f"{file}: format {record['format_version']} was written by a newer version of trainer; "
                f"this one knows formats up to {FORMAT_VERSION}: update it"
            )
        return record

    @property
    def status(self) -> str:
        """As far as this host can tell: a word of the record (`running`, `finished`, ...), `killed` or `damaged`."""
        try:
            record = self.record
        except UserError:
            return DAMAGED
        return KILLED if _is_dead(record) else str(record.get("status", DAMAGED))

    def update(self, **fields: Any) -> None:
        """Change fields of `run.json`, atomically."""
        with locked(self.path / ".lock"):
            self._write({**self.record, **fields, "updated": _now()})

    def begin_attempt(self, world_size: int) -> None:
        """Note that this process goes on with the run. Raises UserError while another one on this host still does."""
        with locked(self.path / ".lock"):
            record = self.record
            if record["status"] == RUNNING and not _is_dead(record) and record["host"] == environment.host():
                raise UserError(
                    still_at_work(self.path, record["host"], record["pid"], record["attempts"][-1]["started"])
                )
            last = record["attempts"][-1]
            if last["status"] == RUNNING:
                last.update(status=KILLED, exit_reason="its process ended without a word")
            attempt = _new_attempt(world_size)
            self._lay_reserve()
            attempts = [*record["attempts"], attempt]
            self._write(
                {
                    **record,
                    **_running(attempt),
                    "attempts": attempts,
                    "updated": attempt["started"],
                }
            )

    def end_attempt(self, status: str, exit_reason: str | None = None) -> str | None:
        """Write how the run ended: the status of the run and of its last attempt; another job may then go on with it.

        On a full disk a reserve is given up for it. Returns one line where it can't be written at all, rather than
        raising an error that would hide the one with which the run ends; None when all is well.
        """
        try:
            with locked(self.path / ".lock"):
                record = self.record
                now = _now()
                record["attempts"][-1].update(status=status, exit_reason=exit_reason, ended=now)
                data = _encoded({**record, "status": status, "exit_reason": exit_reason, "updated": now})
                write_with_reserve(self.path / "run.json", data, self.path / RESERVE)
        except (OSError, UserError) as error:  # UserError: there is no record any more
            why = reason(error) if isinstance(error, OSError) else str(error)
            return f"{self.path}/run.json: that the run ended as {status} could not be recorded ({why})"
        finally:
            if self.lock is not None:
                self.lock.release()
        return None

    def config(self) -> RunConfig:
        """The resolved config."""
        from trainer.load import load

        return load(str(self.path / "config.yaml"), [])

    def log(self, entry: dict[str, Any]) -> None:
        """Append one line to `metrics.jsonl`; see `MetricsLog.append`."""
        self._metrics.append(entry)

    def rewind(self, step: int) -> int:
        """Drop what was logged after `step`; see `MetricsLog.rewind`."""
        return self._metrics.rewind(step)

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """Entries of `metrics.jsonl` in the order they were logged; see `MetricsLog.read`."""
        return self._metrics.read()

    def last_step(self) -> int | None:
        """Step of the last whole entry of `metrics.jsonl`; None where nothing was logged."""
        return self._metrics.last_step()

    def close(self) -> None:
        """Close `metrics.jsonl`; the next `log` opens it again."""
        self._metrics.close()

    def _lay_reserve(self) -> None:
        """Room for the record of a failure on a full disk: real bytes, which no file system stores as nothing."""
        reserve = self.path / RESERVE
        try:
            if not reserve.is_file() or reserve.stat().st_size != RESERVE_BYTES:
                write_atomically(reserve, os.urandom(RESERVE_BYTES))
        except OSError as error:
            if error.errno not in FULL:
                raise  # on a disk that is full from the start, what the run needs itself tells it

    def _write(self, record: dict[str, Any]) -> None:
        write_atomically(self.path / "run.json", _encoded(record))


def find_runs(runs_dir: str | Path, name: str | None = None) -> list[Run]:
    """All runs below `runs_dir` (of the experiment `name`), newest first; damaged ones too, see `Run.status`."""
    # Of one experiment, only that is looked at: a search has hundreds beside each other.
    found = Path(runs_dir).glob("*/*/config.yaml") if name is None else Path(runs_dir, name).glob("*/config.yaml")
    folders = [file.parent for file in found]
    chosen = [folder for folder in folders if name is None or folder.parent.name == name]
    return [Run(folder) for folder in sorted(chosen, key=lambda folder: folder.name, reverse=True)]


def _encoded(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=2) + "\n").encode()


def _make_folder(parent: Path) -> Path:
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            now = datetime.now(UTC)
            folder = parent / f"{now:%Y%m%d-%H%M%S}-{now.microsecond // 1000:03}{secrets.token_hex(2)}"
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
    except OSError as error:
        raise UserError(f"{parent}: no run directory can be made there ({error.strerror}); set runs_dir") from error


def _by_id(run_id: str, runs_dir: Path) -> Path:
    found = [run.path for run in find_runs(runs_dir) if run.id.startswith(run_id)]
    if not found:
        raise UserError(f"{run_id}: neither a run directory nor the id of a run under {runs_dir}/")
    if len(found) > 1:
        raise UserError(f"{run_id}: several runs begin so: {', '.join(map(str, found[:5]))}; give more of the id")
    return found[0]


def _no_run(folder: Path) -> str:
    if not folder.exists():
        return f"{folder}: no such run directory"
    runs = sorted(file.parent.name for file in folder.glob("*/config.yaml"))
    if runs:
        return f"{folder}: the folder of an experiment, not of a run; its newest run is {folder / runs[-1]}"
    return f"{folder}: not a run directory (no run.json in it)"


def _new_attempt(world_size: int) -> dict[str, Any]:
    pid = os.getpid()
    return {
        "started": _now(),
        "ended": None,
        "host": environment.host(),
        "pid": pid,
        "process_started": environment.process_started(pid),
        "world_size": world_size,
        "status": RUNNING,
        "exit_reason": None,
    }


def _running(attempt: dict[str, Any]) -> dict[str, Any]:
    return {
        key: attempt[key]
        for key in (
            "status",
            "exit_reason",
            "host",
            "pid",
            "process_started",
            "world_size",
        )
    }


def _is_dead(record: dict[str, Any]) -> bool:
    if record.get("status") != RUNNING or record.get("host") != environment.host():
        return False
    return not environment.alive(record["pid"], record.get("process_started"))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")

"""The directory of a search: what it was asked for, how far it is, who works on it. No torch, no Ray.

`<runs_dir>/<name>/tune-<id>/` holds `base.yaml` (the resolved config, which runs again as it is), `search.json` (the
record), `journal.jsonl` (all that happened: the state of the search), `trials.jsonl`, `best.yaml`, `report.html`,
`trials/` (run directories of the trials) and `logs/`.
"""

from __future__ import annotations

import json
import os
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainer import environment
from trainer.config import RunConfig
from trainer.errors import TrainerError, UserError
from trainer.files import locked, reason, remedy, write_atomically
from trainer.run_lock import RunLock, acquire

FORMAT_VERSION = 1
RUNNING, FINISHED, INTERRUPTED, FAILED, KILLED = "running", "finished", "interrupted", "failed", "killed"
MARK = ".mark"
"""A file with a random text: a worker that reads the same one sees the same folder."""


class SearchFolder:
    """One search on disk; made by `create` or `open`, which lock it for this process."""

    def __init__(self, path: Path, lock: RunLock) -> None:
        self.path = path
        self._lock = lock
        self.trials.mkdir(exist_ok=True)
        self.logs.mkdir(exist_ok=True)
        self.mark = secrets.token_hex(16)
        write_atomically(path / MARK, self.mark.encode())

    @classmethod
    def create(cls, config: RunConfig) -> SearchFolder:
        """Make `<runs_dir>/<name>/tune-<id>/`. Raises UserError where that can't be."""
        from trainer.load import dump

        parent = Path(config.runs_dir) / config.name
        now = datetime.now(UTC)
        path = parent / f"tune-{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
        try:
            path.mkdir(parents=True)
            write_atomically(path / "base.yaml", dump(config).encode())
            folder = cls(path, acquire(path))
            folder._write({"format_version": FORMAT_VERSION, "name": config.name, "created": _now(), **_owner()})
        except OSError as error:
            raise UserError(
                f"{path}: no search can be begun there ({reason(error)}); {remedy(error)}, or set runs_dir"
            ) from error
        return folder

    @classmethod
    def open(cls, path: str | Path) -> SearchFolder:
        """Lock the search at `path`, to go on with it. UserError where it is none, or another process works on it."""
        folder = Path(path)
        require_search(folder)
        record = read_record(folder)
        if record["format_version"] > FORMAT_VERSION:
            raise UserError(f"{folder} was written by a newer version of trainer: go on with that one")
        found = cls(folder, acquire(folder))
        found.update(**_owner())
        return found

    @property
    def trials(self) -> Path:
        """Run directories of the trials."""
        return self.path / "trials"

    @property
    def logs(self) -> Path:
        """What trials and workers print."""
        return self.path / "logs"

    @property
    def base(self) -> Path:
        """The config that trials vary."""
        return self.path / "base.yaml"

    def update(self, **fields: Any) -> None:
        """Change the record. Raises TrainerError on a disk that takes no more."""
        try:
            with locked(self.path / ".lock"):
                self._write({**read_record(self.path), **fields})
        except OSError as error:
            raise TrainerError(
                f"{self.path}/search.json could not be written ({reason(error)}); {remedy(error)}, then: "
                f"trainer tune --resume {self.path}"
            ) from error

    def close(self, status: str, why: str | None = None) -> None:
        """Write down how it ended, and let the next process in."""
        try:
            self.update(status=status, exit_reason=why)
        finally:
            self._lock.release()

    def _write(self, record: dict[str, Any]) -> None:
        data = json.dumps({**record, "updated": _now()}, indent=2) + "\n"
        write_atomically(self.path / "search.json", data.encode())


def require_search(folder: Path) -> None:
    """UserError where `folder` is not the directory of a search."""
    if not (folder / "search.json").is_file():
        raise UserError(_no_search(folder))


def read_record(folder: Path) -> dict[str, Any]:
    """`search.json`, with status `killed` where it says `running` and that process is gone.

    Raises UserError for a damaged one.
    """
    path = folder / "search.json"
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
        is_here = record["host"] == environment.host()
        if record["status"] == RUNNING and is_here and not environment.alive(record["pid"], record["process_started"]):
            record["status"] = KILLED
        int(record["format_version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); begin a new search") from error
    return record


def _owner() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "status": RUNNING,
        "exit_reason": None,
        "host": environment.host(),
        "pid": pid,
        "process_started": environment.process_started(pid),
    }


def _no_search(folder: Path) -> str:
    if not folder.exists():
        return f"--resume {folder}: no such directory"
    inside = sorted(path.parent.name for path in folder.glob("tune-*/search.json"))
    if inside:
        return f"--resume {folder}: the folder of an experiment, not of a search; its newest is {folder / inside[-1]}"
    return f"--resume {folder}: not the directory of a search (no search.json in it)"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")

"""What is mirrored to MLflow: a run, a search or one of its trials, as the sender sees it. Imports no mlflow."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import yaml

from trainer.run import Run
from trainer.spool import Point

STATUS_TAG = "trainer.status"
ROOT_FILES = ("config.yaml", "environment.txt", "git.diff")


class Mirrored(Protocol):
    """One thing that is one run at MLflow."""

    path: Path
    """Folder of `tracking.json`, which says how far it is sent."""
    id: str
    """By which it is found again at MLflow, whatever was lost."""
    name: str
    """Of the MLflow run."""

    def first_tags(self) -> dict[str, str]:
        """Tags that it is made with, beside its id."""

    def version(self) -> object:
        """Changes with `config` and `tags`, which are sent again then."""

    def config(self) -> dict[str, Any]:
        """What its parameters are made of: a nested mapping."""

    def tags(self) -> dict[str, str]:
        """All other tags."""

    def logs(self) -> dict[str, tuple[Path, str]]:
        """Its files of metrics: name (empty for the only one) -> path, prefix of the names of metrics."""

    def points(self) -> list[Point]:
        """Values that stand in no such file; the steps of a metric ascend."""

    def files(self, is_final: bool) -> Iterator[tuple[Path, str]]:
        """Artifacts: file, and its name with its folder there."""

    def ended_at(self) -> int:
        """When it ended that nobody watched, as Unix time in milliseconds."""

    def note_id(self, mlflow_id: str) -> None:
        """Write down where it went. May raise OSError."""


class MirroredRun:
    """A run directory."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.path = run.path
        self.id = self.name = run.id

    def first_tags(self) -> dict[str, str]:
        return {}

    def version(self) -> object:
        """Described once: the end sets the only tag that changes."""
        return 0

    def config(self) -> dict[str, Any]:
        found = yaml.safe_load((self.path / "config.yaml").read_bytes())
        assert isinstance(found, dict)
        return found

    def tags(self) -> dict[str, str]:
        record = self._run.record
        return {
            STATUS_TAG: record["status"],
            "trainer.lineage": record["lineage"]["id"],
            "trainer.run_dir": str(self.path.resolve()),
            "mlflow.source.name": "trainer fit",
            "mlflow.source.type": "LOCAL",
            **git_tags(record["git"]),
        }

    def logs(self) -> dict[str, tuple[Path, str]]:
        return {"": (self.path / "metrics.jsonl", "")}

    def points(self) -> list[Point]:
        return []

    def files(self, is_final: bool) -> Iterator[tuple[Path, str]]:
        for name in (*ROOT_FILES, *(["run.json"] if is_final else [])):
            if (self.path / name).is_file():
                yield self.path / name, name
        pictures = self.path / "artifacts"
        for file in sorted(pictures.rglob("*")):
            if file.is_file() and not file.name.startswith("."):
                yield file, file.relative_to(pictures).as_posix()

    def ended_at(self) -> int:
        """As its record says, else its last metric."""
        ended = self._run.record["attempts"][-1].get("ended")
        if ended is not None:
            return int(1000 * datetime.fromisoformat(ended).timestamp())
        last = self.path / "metrics.jsonl"
        return int(1000 * (last if last.exists() else self.path / "run.json").stat().st_mtime)

    def note_id(self, mlflow_id: str) -> None:
        if self._run.record.get("mlflow_run_id") != mlflow_id:
            self._run.update(mlflow_run_id=mlflow_id)


def git_tags(git: dict[str, Any] | None) -> dict[str, str]:
    """Of the `git` that a record holds."""
    if not git:
        return {}
    return {
        "mlflow.source.git.commit": git["commit"],
        "mlflow.source.git.branch": git["branch"],
        "trainer.git_dirty": str(git["dirty"]).lower(),
    }

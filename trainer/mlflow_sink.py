"""One run at an MLflow server or database, by the plain client. Imports mlflow: for the mirror and the registry."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from glob import escape as glob_escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

from trainer.contact import Contact
from trainer.files import locked
from trainer.lineage import without_password
from trainer.mirrored import STATUS_TAG
from trainer.run import FAILED, FINISHED, STOPPED
from trainer.spool import Point
from trainer.tracking import sqlite_path

if TYPE_CHECKING:
    from trainer.mirrored import Mirrored

METRICS_PER_CALL = 1000
PARAMS_PER_CALL = 100
KEY_LIMIT = 250
PARAM_LIMIT = 6000
TAG_LIMIT = 8000
"""Limits of MLflow's REST interface."""

NAME_CHARACTERS = re.compile(r"[^\w.\-:/ ]")
DATABASE_PATIENCE = 120.0
"""Seconds to wait while another job makes the tables of a new database."""

STATUSES = {FINISHED: "FINISHED", STOPPED: "FINISHED", "pruned": "FINISHED", FAILED: "FAILED"}
"""MLflow's word for a run's status; all others (preempted, killed) are KILLED, and the tag `trainer.status` tells."""

RUN_ID_TAG = "trainer.run_id"


class MlflowRun:
    """The MLflow run that mirrors one of ours. Every method may raise whatever the client raises, and may then be
    called again: sending twice leaves one copy."""

    def __init__(self, uri: str, experiment: str, mirrored: Mirrored, contact: Contact) -> None:
        self._uri = uri
        self._experiment = experiment
        self._mirrored = mirrored
        self._call = contact.call
        self._accepted: set[tuple[str, bool]] = set()
        self._refused: set[tuple[str, bool]] = set()
        self.client: MlflowClient
        self.id = ""

    def connect(self, known_id: str | None, is_over: bool = False) -> bool:
        """Find or make the experiment and the run; True when the run `known_id` goes on, False for any other.

        It is set to RUNNING, unless it `is_over` and only the rest is sent.
        """
        database = sqlite_path(self._uri)
        if database is None:
            self.client = self._call(MlflowClient, tracking_uri=self._uri, registry_uri=self._uri)
        else:
            database.parent.mkdir(parents=True, exist_ok=True)
            with locked(database.with_name(f"{database.name}.lock"), DATABASE_PATIENCE):
                if not database.exists():
                    _make_database(database)
                _check_database(database)
                self.client = MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)
        experiment_id = self._experiment_id(database)
        found = self._find(known_id, experiment_id)
        if found is None:
            tags = {RUN_ID_TAG: self._mirrored.id, **self._mirrored.first_tags()}
            made = self._call(self.client.create_run, experiment_id, run_name=self._mirrored.name, tags=tags)
            found = str(made.info.run_id)
        elif not is_over:
            self._call(self.client.update_run, found, status="RUNNING")
        self.id = found
        return found == known_id

    def describe(self, config: dict[str, Any], tags: dict[str, str]) -> list[str]:
        """Send parameters (the flattened config, addresses without passwords) and tags; returns the parameters that
        MLflow holds with another value and doesn't let change."""
        params = {key: without_password(value) for key, value in flatten(config)}
        held = self._call(self.client.get_run, self.id).data.params
        new = [Param(key, value) for key, value in params.items() if key not in held]
        for start in range(0, len(new), PARAMS_PER_CALL):
            self._call(self.client.log_batch, self.id, params=new[start : start + PARAMS_PER_CALL])
        run_tags = [RunTag(name(key), value[:TAG_LIMIT]) for key, value in tags.items()]
        self._call(self.client.log_batch, self.id, tags=run_tags)
        return [key for key, value in params.items() if key in held and held[key] != value]

    def log(self, points: Sequence[Point]) -> list[Point]:
        """Send at most `METRICS_PER_CALL` values; returns those that MLflow refuses for what they are.

        One bad value makes MLflow refuse the whole call, so it is searched for by halves. A name of which nothing
        was ever taken is not tried again (nor its non-finite values, where only these are refused): each value would
        cost ten calls.
        """
        refused = [point for point in points if _kind(point) in self._refused]
        points = [point for point in points if _kind(point) not in self._refused]
        if not points:
            return refused
        metrics = [Metric(name(point.key), point.value, point.milliseconds, point.step) for point in points]
        try:
            self._call(self.client.log_batch, self.id, metrics=metrics)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            if len(points) == 1:
                self._check_active()
                self._refused |= {_kind(points[0])} - self._accepted
                return [*refused, *points]
            half = len(points) // 2
            return [*refused, *self.log(points[:half]), *self.log(points[half:])]
        self._accepted.update(map(_kind, points))
        return refused

    def log_file(self, file: Path, folder: str) -> None:
        """Send one file to `folder` of the run's artifacts (empty for their top)."""
        self._call(self.client.log_artifact, self.id, str(file), folder or None)

    def end(self, status: str, milliseconds: int | None = None) -> None:
        """Set the end of the run, at this Unix time (now where not given)."""
        self._call(self.client.set_tag, self.id, STATUS_TAG, status)
        self._call(self.client.set_terminated, self.id, STATUSES.get(status, "KILLED"), milliseconds)

    def _check_active(self) -> None:
        """Raise where it is not the value that was refused, but all that is for this run: it was deleted."""
        if self._call(self.client.get_run, self.id).info.lifecycle_stage != "active":
            raise MlflowException(f"run {self.id} was deleted in MLflow", error_code=RESOURCE_DOES_NOT_EXIST)

    def _experiment_id(self, database: Path | None) -> str:
        experiment = self._call(self.client.get_experiment_by_name, self._experiment)
        if experiment is None:
            location = None
            if database is not None:
                location = (database.resolve().parent / "mlartifacts").as_uri() + "/" + quote(self._experiment)
            try:
                return str(self._call(self.client.create_experiment, self._experiment, artifact_location=location))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = self._call(self.client.get_experiment_by_name, self._experiment)  # another was faster
        if experiment is None or experiment.lifecycle_stage != "active":
            raise MlflowException(
                f"experiment {self._experiment!r} was deleted in MLflow: restore it, or set tracking.experiment"
            )
        return str(experiment.experiment_id)

    def _find(self, known_id: str | None, experiment_id: str) -> str | None:
        if known_id is not None:
            try:
                info = self._call(self.client.get_run, known_id).info
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            else:
                return known_id if info.lifecycle_stage == "active" else None
        # One that was made just before a mirror was killed, or before a server's answer was lost on its way
        mine = f"tags.`{RUN_ID_TAG}` = '{self._mirrored.id}'"
        runs = self._call(
            self.client.search_runs, [experiment_id], mine, run_view_type=ViewType.ACTIVE_ONLY, max_results=1
        )
        return str(runs[0].info.run_id) if runs else None


def _kind(point: Point) -> tuple[str, bool]:
    """What MLflow takes or refuses as a whole: a name, or the non-finite values of one."""
    return point.key, math.isfinite(point.value)


def _make_database(database: Path) -> None:
    """Make MLflow's tables under another name, then give the file its own.

    MLflow itself makes them in the file that others already see: two jobs at once, or one that is killed meanwhile,
    leave a database that it never opens again ("table _alembic_tmp_tags already exists"). The name is new each time,
    since MLflow keeps its connections to one that could not be finished on a full disk.
    """
    pattern = f".{database.name}.unfinished"
    for left in database.parent.glob(f"{glob_escape(pattern)}*"):
        left.unlink(missing_ok=True)
    unfinished = database.with_name(f"{pattern}-{secrets.token_hex(4)}")
    uri = f"sqlite:///{unfinished.resolve()}"
    try:
        MlflowClient(tracking_uri=uri, registry_uri=uri).search_experiments(max_results=1)
        os.replace(unfinished, database)
    except BaseException:
        unfinished.unlink(missing_ok=True)  # it may be what fills the disk
        raise


def _check_database(database: Path) -> None:
    """Raise at once for a file that can't be opened or is no database: MLflow would try for 100 s."""
    with closing(sqlite3.connect(f"file:{quote(str(database.resolve()))}?mode=rw", uri=True)) as connection:
        connection.execute("PRAGMA schema_version")


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """A nested mapping as (dotted key, value written as in JSON), both cut to MLflow's limits."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        yield name(prefix), text[:PARAM_LIMIT]


def name(key: str) -> str:
    """A name that MLflow takes: `accuracy@5` becomes `accuracy_5`."""
    return NAME_CHARACTERS.sub("_", key)[:KEY_LIMIT]

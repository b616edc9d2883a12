"""Known points from an MLflow experiment: runs of ours, nested trials of a search, runs of anybody else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from trainer.errors import TrainerError, UserError
from trainer.lineage import without_password
from trainer.search.known import NOT_FINISHED, Candidate, Skipped
from trainer.search.trial import FINISHED, PRUNED, Report
from trainer.tracking import MLFLOW_ENVIRONMENT, sqlite_path, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRunEntity

    from trainer.config import RunConfig

KIND_TAG = "trainer.kind"
PARENT_TAG = "mlflow.parentRunId"
STATUS_TAG = "trainer.status"
OBJECTIVE_PREFIX = "objective/"
"""Of the values that a search was told, see `mirrored`."""
PAGE = 500


def mlflow_candidates(
    experiment: str, config: RunConfig, objective: Mapping[str, str]
) -> Iterator[Callable[[], Candidate]]:
    """Each run of the experiment at `config.tracking`; UserError where there is no such experiment."""
    uri = tracking_uri(config.tracking, config.runs_dir)
    nothing = UserError(
        f"--warm-start {experiment}: no such folder, no experiment in {config.runs_dir}/, and none of this name in "
        f"MLflow at {without_password(uri)}"
    )
    database = sqlite_path(uri)
    if database is not None and not database.exists():
        raise nothing
    for key, value in MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            raise nothing
        return _each(client, str(found.experiment_id), objective)
    except MlflowException as error:
        why = " ".join(without_password(str(error)).split())
        raise TrainerError(f"--warm-start {experiment}: MLflow at {without_password(uri)}: {why}") from error


def _each(client: MlflowClient, experiment_id: str, objective: Mapping[str, str]) -> Iterator[Callable[[], Candidate]]:
    runs: dict[str, MlflowRunEntity] = {}
    token = None
    while True:
        page = client.search_runs([experiment_id], max_results=PAGE, page_token=token)
        runs |= {run.info.run_id: run for run in page}
        token = page.token
        if not token:
            break
    for run in runs.values():
        if run.data.tags.get(KIND_TAG) not in ("search", "fold"):
            parent = runs.get(run.data.tags.get(PARENT_TAG, ""))
            yield partial(_candidate, client, run, parent, objective)


def _candidate(
    client: MlflowClient, run: MlflowRunEntity, parent: MlflowRunEntity | None, objective: Mapping[str, str]
) -> Candidate:
    status = run.data.tags.get(STATUS_TAG, "")
    if run.info.status != "FINISHED":
        raise Skipped("failed" if run.info.status == "FAILED" else NOT_FINISHED)
    params = {**(parent.data.params if parent is not None else {}), **run.data.params}
    return Candidate(
        origin=f"MLflow run {run.info.run_id}",
        state=PRUNED if status in (PRUNED, "stopped") else FINISHED,
        params=params,
        config=nested(params),
        reports=_reports(client, run, objective),
        is_text=True,
    )


def _reports(client: MlflowClient, run: MlflowRunEntity, objective: Mapping[str, str]) -> list[Report]:
    """By step, the history of each metric of the objective. What a search was told itself stands for a trial whose
    objective is no metric of a single run, the mean over folds."""
    from trainer.mlflow_sink import name as name_of

    points: dict[int, dict[str, float]] = {}
    times: dict[int, int] = {}
    for metric in objective:
        own = name_of(metric)
        name = own if own in run.data.metrics else name_of(f"{OBJECTIVE_PREFIX}{metric}")
        if name in run.data.metrics:
            for point in client.get_metric_history(run.info.run_id, name):
                points.setdefault(point.step, {})[metric] = float(point.value)
                times[point.step] = point.timestamp
    began = min(times.values(), default=0)
    return [
        Report(number, step, 0.0, points[step], (times[step] - began) / 1000)
        for number, step in enumerate(sorted(points), start=1)
    ]


def nested(params: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as mappings inside of mappings, as they were before MLflow."""
    whole: dict[str, Any] = {}
    for key, value in params.items():
        *parents, last = key.split(".")
        place = whole
        for part in parents:
            inner = place.setdefault(part, {})
            if not isinstance(inner, dict):
                inner = place[part] = {}
            place = inner
        place[last] = value
    return whole

"""The MLflow registry: a run's checkpoint becomes a version of a registered model, found by an alias."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer import checkpoint
from trainer.errors import TrainerError, UserError
from trainer.lineage import without_password
from trainer.tracking import MLFLOW_ENVIRONMENT, read_state, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from trainer.checkpoint import Checkpoint
    from trainer.config import Checkpoint as CheckpointRule
    from trainer.run import Run


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    model: str
    version: str
    alias: str | None
    source: str
    step: int
    metrics: dict[str, float]


def register(run: Run, model: str, alias: str | None) -> Version:
    """Make the run's best checkpoint (`checkpoint.monitor`; else its newest) a version of `model`, and set `alias`.

    The checkpoint is checked, then stored with its config among the artifacts of the run's MLflow run. A checkpoint
    that is a version already gets no second one. Raises UserError where there is nothing to register.
    """
    config = run.config()
    chosen = choose_checkpoint(run, config.checkpoint)
    state = read_state(run.path)
    run_id = state.get("mlflow_run_id")
    if run_id is None:
        raise UserError(f"{run.path}: not in MLflow yet; send it there with: trainer runs sync {run.path}")
    uri = tracking_uri(config.tracking, run.path.parent.parent)
    if without_password(uri) != state["uri"]:
        raise UserError(
            f"{run.path}: it was mirrored to {state['uri']}, not {without_password(uri)}; set MLFLOW_TRACKING_URI"
        )
    for key, value in MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        return _register(MlflowClient(tracking_uri=uri, registry_uri=uri), run, run_id, chosen, model, alias)
    except MlflowException as error:
        kind = UserError if error.error_code == "INVALID_PARAMETER_VALUE" else TrainerError
        raise kind(f"MLflow at {state['uri']}: {' '.join(without_password(str(error)).split())}") from error


def alias_uri(given: str | None) -> str:
    """Where the registry of a deployment is: `given`, else MLFLOW_TRACKING_URI, else `runs/mlflow.db`.

    Raises UserError for an address with a password: it would be written down.
    """
    from trainer.config import Tracking

    if given is not None and without_password(given) != given:
        raise UserError("--tracking-uri: it holds a password; set MLFLOW_TRACKING_URI where the front runs instead")
    return tracking_uri(Tracking(uri=given), "runs")


def point_alias(uri: str, model: str, alias: str, of_run: dict[str, Any]) -> Version:
    """Make `alias` name the version of `model` that a bundle was exported from.

    Args:
        of_run: the field `run` of the bundle: its `mlflow_run_id` or `lineage`, and its `checkpoint`.

    Raises UserError where that run's checkpoint is no version of the model, TrainerError where MLflow fails.
    """
    for key, value in MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    checkpoint_name, lineage = of_run.get("checkpoint"), of_run.get("lineage")
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    try:
        found = [
            version
            for version in client.search_model_versions(f"name = '{model}'")
            if version.tags.get("trainer.checkpoint") == checkpoint_name
            and (version.run_id == of_run.get("mlflow_run_id") or version.tags.get("trainer.lineage") == lineage)
        ]
        if not found or checkpoint_name is None:
            raise UserError(
                f"{checkpoint_name} of run {of_run.get('id')} is no version of {model}; "
                f"make it one with: trainer runs register {of_run.get('id')} --name {model}"
            )
        newest = max(found, key=lambda version: int(version.version))
        client.set_registered_model_alias(model, alias, newest.version)
    except MlflowException as error:
        text = " ".join(without_password(str(error)).split())
        raise TrainerError(f"MLflow at {without_password(uri)}: {text}") from error
    return Version(model, str(newest.version), alias, str(newest.source), 0, {})


def choose_checkpoint(run: Run, rule: CheckpointRule) -> Checkpoint:
    """The checkpoint that stands for the run, with all its files checked."""
    best = checkpoint.best(run.checkpoints, rule.monitor, rule.mode) if rule.monitor else None
    if best is not None:
        checkpoint.verify(best)
        return best
    damaged: list[str] = []
    newest = checkpoint.newest_whole(run.checkpoints, damaged.append)
    if newest is None:
        raise UserError("; ".join([f"{run.path}: no whole checkpoint to register", *damaged]))
    return newest


def _register(
    client: MlflowClient, run: Run, run_id: str, chosen: Checkpoint, model: str, alias: str | None
) -> Version:
    from mlflow.exceptions import MlflowException

    from trainer.mlflow_sink import name

    folder = f"checkpoints/{chosen.path.name}"
    try:
        client.create_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    manifest = chosen.manifest
    tags = {
        "trainer.lineage": run.record["lineage"]["id"],
        "trainer.run_dir": str(run.path.resolve()),
        "trainer.checkpoint": chosen.path.name,
        **{name(key): repr(value) for key, value in manifest.metrics.items()},
    }
    known = [
        version
        for version in client.search_model_versions(f"name = '{model}' and run_id = '{run_id}'")
        if version.tags.get("trainer.checkpoint") == chosen.path.name
    ]
    if known:
        version = known[0]
    else:
        client.log_artifacts(run_id, str(chosen.path), folder)
        client.log_artifact(run_id, str(run.path / "config.yaml"), folder)
        version = client.create_model_version(model, source=f"runs:/{run_id}/{folder}", run_id=run_id, tags=tags)
    if alias is not None:
        client.set_registered_model_alias(model, alias, version.version)
    return Version(model, str(version.version), alias, str(version.source), manifest.step, manifest.metrics)

"""A bundle that is yet to be written, so that its programs can be run as the server will run them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serving import bundle as bundles
from serving.bundle import Bundle
from trainer.export import golden
from trainer.export.opened import Opened
from trainer.export.programs import Program
from trainer.run import Run
from trainer.tracking import read_state

WARM_UP = (1, 32)


def draft(opened: Opened, folder: Path, name: str, program: Program, count: int, tolerance: float) -> Bundle:
    """The bundle of `folder` with this program, without hashes and metrics."""
    servable = opened.servable
    return Bundle(
        path=folder,
        name=name,
        version="",
        created="",
        task=opened.config.recipe.name,
        program=bundles.Program(program.runtime, program.path.name, program.dtype),
        preprocessing=servable.preprocessing,
        signature=servable.signature,
        postprocessing=servable.postprocessing,
        golden=bundles.Golden(golden.FILE, count, tolerance),
        metrics={},
        run=origin(opened.run, opened.checkpoint.path.name),
        warmup_batches=WARM_UP,
        files={},
    )


def content(made: Bundle, metrics: dict[str, float]) -> dict[str, Any]:
    """What `serving.bundle.finish` takes."""
    return {
        "name": made.name,
        "task": made.task,
        "program": bundles.plain(made.program),
        "preprocessing": made.preprocessing,
        "signature": made.signature.as_json(),
        "postprocessing": made.postprocessing,
        "golden": bundles.plain(made.golden),
        "metrics": metrics,
        "run": made.run,
        "warmup_batches": list(made.warmup_batches),
    }


def origin(run: Run, checkpoint: str) -> dict[str, Any]:
    """The field `run` of a bundle: where it comes from, and what finds it in MLflow where it is there."""
    record = run.record
    return {
        "id": run.id,
        "name": record["name"],
        "checkpoint": checkpoint,
        "lineage": record["lineage"]["id"],
        "config_hash": record["lineage"]["config"],
        "code_hash": record["lineage"]["code"],
        "data_hash": record["lineage"]["data"],
        "git": record["git"],
        "mlflow_run_id": read_state(run.path).get("mlflow_run_id"),
    }

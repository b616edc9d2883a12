"""The peers' trainings with MLflow as it comes: `python -m workloads.digits_with_mlflow hand|lightning URI FOLDER`."""

from __future__ import annotations

import sys


def by_hand(uri: str) -> None:
    import mlflow

    from workloads import digits_by_hand

    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment("digits")
    with mlflow.start_run():
        digits_by_hand.main(lambda step, loss: mlflow.log_metric("loss", loss, step))


def on_lightning(uri: str, folder: str) -> None:
    from lightning.pytorch.loggers import MLFlowLogger

    from workloads import digits_on_lightning

    digits_on_lightning.main(folder, MLFlowLogger("digits", tracking_uri=uri))


if __name__ == "__main__":
    kind, uri, folder = sys.argv[1:]
    by_hand(uri) if kind == "hand" else on_lightning(uri, folder)

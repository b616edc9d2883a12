"""The model as MLflow's pyfunc, written down as code; `mlflow models serve` runs it.

python -m workloads.serving_mlflow small|resnet18 FOLDER
"""

import base64
import os
import sys
from pathlib import Path
from typing import Any

import mlflow
import torch
from mlflow.models import set_model

from workloads import serving_models

NAME = "BENCH_MODEL"


class Predictor(mlflow.pyfunc.PythonModel):
    def load_context(self, context: Any) -> None:
        self.name = os.environ[NAME]
        self.model = serving_models.build(self.name)

    def predict(self, context: Any, model_input: Any, params: Any = None) -> list[dict[str, Any]]:
        if self.name == serving_models.SMALL:
            batch = torch.as_tensor(model_input, dtype=torch.float32)
        else:
            batch = torch.stack([serving_models.decode(base64.b64decode(one)) for one in model_input])
        with torch.inference_mode():
            return [serving_models.answer(row) for row in self.model(batch)]


if __name__ == "__main__":
    mlflow.pyfunc.save_model(sys.argv[2], python_model=str(Path(__file__)), pip_requirements=[])
else:
    set_model(Predictor())

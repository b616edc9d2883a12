"""mosec with batching.

python -m workloads.serving_mosec small|resnet18 PORT
"""

import os
import sys
from typing import Any

import torch
from mosec import Server, Worker

from workloads import serving_models

NAME = "BENCH_MODEL"
"""In the environment: mosec has the command line to itself, and its workers are processes of their own."""
WAIT_MS = 1


class Predictor(Worker):
    def __init__(self) -> None:
        super().__init__()
        self.model = serving_models.build(os.environ[NAME])

    def deserialize(self, data: bytes) -> Any:
        return super().deserialize(data) if os.environ[NAME] == serving_models.SMALL else data

    def forward(self, data: list[Any]) -> list[Any]:
        if os.environ[NAME] == serving_models.SMALL:
            batch = torch.tensor([one["features"] for one in data])
        else:
            batch = torch.stack([serving_models.decode(one) for one in data])
        with torch.inference_mode():
            return [serving_models.answer(row) for row in self.model(batch)]


if __name__ == "__main__":
    os.environ[NAME] = sys.argv[1]
    sys.argv = [sys.argv[0], "--address", "127.0.0.1", "--port", sys.argv[2], "--log-level", "warning"]
    server = Server()
    server.append_worker(Predictor, num=1, max_batch_size=serving_models.BATCH, max_wait_time=WAIT_MS, route="/predict")
    server.run()

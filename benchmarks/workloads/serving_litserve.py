"""LitServe with batching, as its documentation sets it up.

python -m workloads.serving_litserve small|resnet18 PORT
"""

import base64
import sys
from typing import Any

import litserve
import torch

from workloads import serving_models

BATCH_TIMEOUT = 0.005


class API(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.model = serving_models.build(sys.argv[1])

    def decode_request(self, request: dict[str, Any]) -> torch.Tensor:
        if "features" in request:
            return torch.tensor(request["features"])
        return serving_models.decode(base64.b64decode(request["image"]))

    def batch(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(inputs)

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self.model(x)

    def unbatch(self, output: torch.Tensor) -> list[torch.Tensor]:
        return list(output)

    def encode_response(self, output: torch.Tensor) -> dict[str, Any]:
        return serving_models.answer(output)


if __name__ == "__main__":
    api = API(max_batch_size=serving_models.BATCH, batch_timeout=BATCH_TIMEOUT)
    server = litserve.LitServer(api, accelerator="cpu", fast_queue=True)
    server.run(host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", generate_client_file=False)

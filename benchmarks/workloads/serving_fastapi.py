"""The peer that most people write: FastAPI, a pydantic model, and the model's call in the handler.

python -m workloads.serving_fastapi small|resnet18 PORT
"""

import sys

import torch
import uvicorn
from fastapi import FastAPI, Request
from pydantic import BaseModel

from workloads import serving_models

name, port = sys.argv[1], int(sys.argv[2])
app = FastAPI()
model = serving_models.build(name)


class Sample(BaseModel):
    features: list[float]


class Prediction(BaseModel):
    label: str
    score: float
    scores: list[float]


if name == serving_models.SMALL:

    @app.post("/predict")
    async def predict(sample: Sample) -> Prediction:
        with torch.inference_mode():
            return Prediction(**serving_models.answer(model(torch.tensor([sample.features]))[0]))

else:

    @app.post("/predict")
    async def predict_picture(request: Request) -> Prediction:
        picture = serving_models.decode(await request.body())
        with torch.inference_mode():
            return Prediction(**serving_models.answer(model(picture[None])[0]))


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")

"""Over HTTP, too, a bundle answers as the run's own evaluation did: every test sample, in every way to ask."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import exported_runs
import numpy as np
import pytest
from exported_runs import Expected, export
from front_server import Answer, FrontServer
from PIL import Image

from trainer.export import measure

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    return exported_runs.expected(exported_runs.digits(tmp_path_factory.mktemp("digits")))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    return exported_runs.expected(exported_runs.pictures(tmp_path_factory.mktemp("pictures")))


@pytest.fixture(scope="module")
def server(digits: Expected, pictures: Expected, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontServer]:
    """Serves both, each exported by the command line in a format of its own."""
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "SECONDS", 0.0)
        bundles = [
            export(digits.run, folder / "digits", "--format", "pt2"),
            export(pictures.run, folder / "pictures", "--format", "onnx"),
        ]
    server = FrontServer(folder, *(f"{path.name}={path}" for path in bundles))
    yield server
    server.close()


def _predictions(answer: Answer) -> list[dict[str, Any]]:
    assert answer.status == 200, answer
    rows: list[dict[str, Any]] = answer.json["predictions"]
    return rows


def _require_same(rows: list[dict[str, Any]], wanted: Expected) -> None:
    assert len(rows) == len(wanted.scores)
    assert [row["label"] for row in rows] == [wanted.labels[index] for index in wanted.scores.argmax(1)]
    assert np.abs(np.array([row["scores"] for row in rows]) - wanted.scores).max() <= TOLERANCE
    assert np.abs(np.array([row["score"] for row in rows]) - wanted.scores.max(1)).max() <= TOLERANCE


@pytest.mark.parametrize("size", [1, 7, 64])
def test_digits_as_json(server: FrontServer, digits: Expected, size: int) -> None:
    """269 samples, alone and in requests of several; the last one is ragged."""
    rows: list[dict[str, Any]] = []
    for at in range(0, len(digits.requests), size):
        rows += _predictions(server.predict(*digits.requests[at : at + size], model="digits"))
    _require_same(rows, digits)


def test_digits_as_tensors(server: FrontServer, digits: Expected) -> None:
    pixels = np.array(digits.requests, np.uint8)
    tensor = {"name": "image", "datatype": "UINT8", "shape": [*pixels.shape], "data": pixels.ravel().tolist()}
    answer = server.ask("POST", "/v2/models/digits/infer", {"inputs": [tensor]})
    assert answer.status == 200, answer
    scores = np.array(answer.json["outputs"][0]["data"]).reshape(digits.scores.shape)
    assert np.abs(scores - digits.scores).max() <= TOLERANCE
    assert (scores.argmax(1) == digits.scores.argmax(1)).all()


def test_digits_as_files(server: FrontServer, digits: Expected) -> None:
    """A picture without loss says the same as its pixels."""
    rows = []
    for pixels in digits.requests:
        file = io.BytesIO()
        Image.fromarray(np.array(pixels, np.uint8)).save(file, "PNG")
        rows += _predictions(server.ask("POST", "/models/digits/predict", file.getvalue(), content_type="image/png"))
    _require_same(rows, digits)


def test_jpeg_files_as_bytes(server: FrontServer, pictures: Expected) -> None:
    assert len(pictures.files) == 36
    rows = []
    for file in pictures.files:
        rows += _predictions(server.ask("POST", "/models/pictures/predict", file, content_type="image/jpeg"))
    _require_same(rows, pictures)


def test_jpeg_files_in_json(server: FrontServer, pictures: Expected) -> None:
    _require_same(_predictions(server.predict(*pictures.requests, model="pictures")), pictures)


def test_jpeg_files_as_tensors(server: FrontServer, pictures: Expected) -> None:
    data = [base64.b64encode(file).decode() for file in pictures.files]
    tensor = {"name": "image", "datatype": "BYTES", "shape": [len(data)], "data": data}
    answer = server.ask("POST", "/v2/models/pictures/infer", {"inputs": [tensor]})
    assert answer.status == 200, answer
    scores = np.array(answer.json["outputs"][0]["data"]).reshape(pictures.scores.shape)
    assert np.abs(scores - pictures.scores).max() <= TOLERANCE


def test_many_at_once(server: FrontServer, digits: Expected) -> None:
    """Gathered into batches with the requests of others, each gets the answer to its own."""

    def one(index: int) -> dict[str, Any]:
        return _predictions(server.predict(digits.requests[index], model="digits"))[0]

    with ThreadPoolExecutor(32) as pool:
        _require_same(list(pool.map(one, range(len(digits.requests)))), digits)

"""The Open Inference Protocol v2 against a real server, in JSON and in raw bytes."""

from __future__ import annotations

import base64
import json
import struct
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from front_bundles import LABELS, encoded
from front_server import Answer, FrontServer, ask
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException

X = {"name": "x", "shape": [2, 3], "datatype": "FP32", "data": [2, 4, 6, 8, 10, 12]}
N = {"name": "n", "shape": [2, 2], "datatype": "INT64", "data": [[1, 2], [3, 4]]}


def infer(front: FrontServer, model: str, *inputs: Any, **more: Any) -> Answer:
    return front.ask("POST", f"/v2/models/{model}/infer", {"inputs": list(inputs), **more})


def outputs(answer: Answer) -> dict[str, Any]:
    assert answer.status == 200, answer
    return {output["name"]: output for output in answer.json["outputs"]}


def error(answer: Answer) -> tuple[int, str]:
    assert set(answer.json) == {"error"} and answer.headers["content-type"] == "application/json"
    return answer.status, answer.json["error"]


def packed(texts: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def binary(front: FrontServer, model: str, content: Any, *blobs: bytes, **headers: str) -> Answer:
    head = json.dumps(content).encode()
    named = {"Inference_Header_Content_Length": str(len(head)), "content_type": "application/octet-stream", **headers}
    return front.ask("POST", f"/v2/models/{model}/infer", head + b"".join(blobs), **named)


def unpack(answer: Answer) -> tuple[Any, bytes]:
    assert answer.status == 200, answer
    length = int(answer.headers["inference-header-content-length"])
    return json.loads(answer.body[:length]), answer.body[length:]


def test_server_and_health(front: FrontServer) -> None:
    server = front.ask("GET", "/v2").json
    assert server["name"] and server["version"] and "binary_tensor_data" in server["extensions"]
    assert front.ask("GET", "/v2/health/live").json == {"live": True}
    assert front.ask("GET", "/v2/health/ready").json == {"ready": True}


def test_metadata(front: FrontServer) -> None:
    numbers = front.ask("GET", "/v2/models/numbers").json
    assert numbers["inputs"] == [
        {"name": "x", "datatype": "FP32", "shape": [-1, 3]},
        {"name": "n", "datatype": "INT64", "shape": [-1, 2]},
    ]
    assert numbers["outputs"][1] == {"name": "total", "datatype": "INT64", "shape": [-1]}
    digits = front.ask("GET", "/v2/models/digits").json
    assert digits["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    version = digits["versions"][0]
    assert front.ask("GET", f"/v2/models/digits/versions/{version}").json == digits
    assert front.ask("GET", "/v2/models/digits/ready").json == {"name": "digits", "ready": True}
    assert front.ask("GET", f"/v2/models/digits/versions/{version}/ready").status == 200
    assert error(front.ask("GET", "/v2/models/digits/versions/1"))[0] == 404
    assert error(front.ask("GET", "/v2/models/nobody"))[0] == 404


def test_tensors_in_json(front: FrontServer) -> None:
    answer = infer(front, "numbers", N, X, id="7")
    found = outputs(answer)
    assert answer.json["id"] == "7" and answer.json["model_name"] == "numbers"
    assert found["half"] == {"name": "half", "datatype": "FP32", "shape": [2, 3], "data": [1, 2, 3, 4, 5, 6]}
    assert found["total"] == {"name": "total", "datatype": "INT64", "shape": [2], "data": [3, 7]}
    assert list(outputs(infer(front, "numbers", X, N, outputs=[{"name": "total"}]))) == ["total"]


def test_tensors_in_bytes(front: FrontServer) -> None:
    x = np.array([[4, 8, 12]], "<f4").tobytes()
    n = np.array([[5, 6]], "<i8").tobytes()
    inputs = [
        {"name": "x", "shape": [1, 3], "datatype": "FP32", "parameters": {"binary_data_size": len(x)}},
        {"name": "n", "shape": [1, 2], "datatype": "INT64", "parameters": {"binary_data_size": len(n)}},
    ]
    found = outputs(binary(front, "numbers", {"inputs": inputs}, x, n))
    assert found["half"]["data"] == [2, 4, 6] and found["total"]["data"] == [11]
    head, rest = unpack(binary(front, "numbers", {"inputs": inputs, "parameters": {"binary_data_output": True}}, x, n))
    assert [o["parameters"]["binary_data_size"] for o in head["outputs"]] == [12, 8]
    assert np.frombuffer(rest[:12], "<f4").tolist() == [2, 4, 6] and np.frombuffer(rest[12:], "<i8").tolist() == [11]
    one = [{"name": "half", "parameters": {"binary_data": True}}, {"name": "total"}]
    head, rest = unpack(binary(front, "numbers", {"inputs": inputs, "outputs": one}, x, n))
    assert head["outputs"][1]["data"] == [11] and len(rest) == 12


def test_pictures_in_every_form(front: FrontServer) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8)).astype(np.uint8)
    data = encoded(pixels, ".png")
    text = base64.b64encode(data).decode()
    flat = {"name": "image", "shape": [1, 8, 8], "datatype": "UINT8", "data": pixels.ravel().tolist()}
    raw = {"name": "image", "shape": [1, 8, 8], "datatype": "UINT8", "parameters": {"binary_data_size": 64}}
    file = {"name": "image", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(data) + 4}}
    answers = [
        infer(front, "digits", {"name": "image", "shape": [1], "datatype": "BYTES", "data": [text]}),
        infer(front, "digits", {"name": "image", "shape": [1, 1], "datatype": "BYTES", "data": [[text]]}),
        infer(front, "digits", flat),
        binary(front, "digits", {"inputs": [raw]}, pixels.tobytes()),
        binary(front, "digits", {"inputs": [file]}, packed([data])),
    ]
    found = [outputs(answer) for answer in answers]
    assert all(one == found[0] for one in found)
    own = front.predict(pixels.tolist()).json["predictions"][0]
    np.testing.assert_allclose(found[0]["scores"]["data"], own["scores"], atol=1e-6)
    assert found[0]["label"]["data"] == [own["label"]] and own["label"] in LABELS
    wants = {"inputs": [raw], "outputs": [{"name": "label", "parameters": {"binary_data": True}}]}
    assert unpack(binary(front, "digits", wants, pixels.tobytes()))[1] == packed([own["label"].encode()])


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ([], "inputs: expected x, n, each once"),
        ([X], "expected x, n"),
        ([X, X, N], "each once"),
        ([X, {**N, "name": "m"}], "expected x, n"),
        ([{**X, "datatype": "FP64"}, N], "inputs[0].datatype: 'FP64'; expected FP32"),
        ([{**X, "shape": [2, 4]}, N], "inputs[0].shape: [2, 4]; expected [-1, 3]"),
        ([{**X, "shape": []}, N], "inputs[0].shape"),
        ([{**X, "shape": [-2, 3]}, N], "inputs[0].shape"),
        ([{**X, "shape": [0, 3], "data": []}, N], "the batch is empty"),
        ([{**X, "shape": [1, 3]}, N], "inputs[0].data: 6 elements; the shape says 3"),
        ([{**X, "data": [[1, 2], [3, 4], [5, 6]]}, N], "inputs[0].data: nested as [3, 2]"),
        ([{**X, "data": [1, 2, 3, 4, 5, "6"]}, N], "inputs[0].data"),
        ([{**X, "data": [1, 2, 3, 4, 5, 1e39]}, N], "out of range"),
        ([{**X, "data": None}, N], "inputs[0].data: is missing"),
        ([{**X, "data": 3}, N], "Expected `array | null`"),
        ([X, {**N, "shape": [1, 2], "data": [1, 2]}], "the inputs differ in the batch"),
        ([X, {**N, "data": [1, 2, 3, 4.5]}], "no whole number"),
        ([{**X, "parameters": {"binary_data_size": 24}}, N], "binary_data_size"),
    ],
)
def test_bad_tensors(front: FrontServer, inputs: list[Any], says: str) -> None:
    status, message = error(infer(front, "numbers", *inputs))
    assert status == 400 and says in message, message


@pytest.mark.parametrize(
    ("tensor", "status", "says"),
    [
        ({"shape": [1], "datatype": "BYTES", "data": ["!"]}, 400, "inputs[0].data[0].b64: is no base64"),
        ({"shape": [1], "datatype": "BYTES", "data": ["aGVsbG8="]}, 422, "inputs[0].data[0].b64"),
        ({"shape": [1], "datatype": "BYTES", "data": [3]}, 400, "inputs[0].data[0]"),
        ({"shape": [2], "datatype": "BYTES", "data": ["aGVsbG8="]}, 400, "1 elements; the shape says 2"),
        ({"shape": [1, 2], "datatype": "BYTES", "data": ["a", "b"]}, 400, "expected [batch]"),
        ({"shape": [1, 8, 8], "datatype": "FP32", "data": [0] * 64}, 400, "expected BYTES [batch]"),
        ({"shape": [1, 8, 8], "datatype": "UINT8", "data": [256] * 64}, 400, "out of range"),
        ({"shape": [1, 8, 9], "datatype": "UINT8", "data": [0] * 72}, 400, "expected pixels [8, 8]"),
    ],
)
def test_bad_pictures(front: FrontServer, tensor: Any, status: int, says: str) -> None:
    found = error(infer(front, "digits", {"name": "image", **tensor}))
    assert found[0] == status and says in found[1], found


def test_bad_bytes(front: FrontServer) -> None:
    raw = {"name": "image", "shape": [1, 8, 8], "datatype": "UINT8", "parameters": {"binary_data_size": 64}}
    for blob in (bytes(63), bytes(65), b""):
        assert error(binary(front, "digits", {"inputs": [raw]}, blob))[0] == 400
    size = {**raw, "parameters": {"binary_data_size": 63}}
    assert "takes 64" in error(binary(front, "digits", {"inputs": [size]}, bytes(63)))[1]
    for blob in (b"\xff\xff\xff\xff", packed([b"a", b"b"]), b"abc"):
        file = {"name": "image", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(blob)}}
        assert error(binary(front, "digits", {"inputs": [file]}, blob))[0] == 400
    for length in ("x", "-1", "99999999", "9" * 50):
        found = binary(front, "digits", {"inputs": [raw]}, bytes(64), Inference_Header_Content_Length=length)
        assert error(found)[0] == 400


def test_bad_requests(front: FrontServer) -> None:
    assert error(front.ask("POST", "/v2/models/digits/infer", b"{", content_type="application/json"))[0] == 400
    assert error(front.ask("POST", "/v2/models/digits/infer", b"x", content_type="image/png"))[0] == 415
    assert error(front.ask("GET", "/v2/models/digits/infer"))[0] == 405
    assert error(front.ask("GET", "/v2/nothing"))[0] == 404
    assert "there are: half, total" in error(infer(front, "numbers", X, N, outputs=[{"name": "z"}]))[1]
    asked = [{"name": "total", "parameters": {"classification": 3}}]
    assert "not offered" in error(infer(front, "numbers", X, N, outputs=asked))[1]
    many = {**N, "shape": [5000, 2], "data": [0] * 10_000}
    assert error(infer(front, "numbers", X, many))[0] == 413


def test_repository(front: FrontServer) -> None:
    rows = front.ask("POST", "/v2/repository/index").json
    assert [row["name"] for row in rows][:3] == ["digits", "photos", "numbers"]
    assert {row["state"] for row in rows} == {"READY"}
    assert front.ask("POST", "/v2/repository/index", {"ready": True}).json == rows
    loaded = front.ask("POST", "/v2/repository/models/numbers/load")
    assert loaded.status == 200 and loaded.json["version"] == rows[2]["version"]
    assert error(front.ask("POST", "/v2/repository/models/nobody/load"))[0] == 404
    given = front.ask("POST", "/v2/repository/models/numbers/load", {"parameters": {"config": "x"}})
    assert error(given)[0] == 400
    page = front.ask("POST", "/v2/repository/models/numbers/load", origin="http://elsewhere.example")
    assert error(page)[0] == 403


@pytest.mark.parametrize("binary", [False, True])
def test_tritons_own_client(front: FrontServer, binary: bool) -> None:
    """NVIDIA's client, with tensors in JSON and as raw bytes."""
    with triton.InferenceServerClient(f"127.0.0.1:{front.port}") as client:
        assert client.is_server_live() and client.is_server_ready()
        assert client.is_model_ready("numbers") and not client.is_model_ready("nowhere")
        assert [entry["name"] for entry in client.get_model_metadata("numbers")["inputs"]] == ["x", "n"]
        x, n = np.float32([[2, 4, 6], [8, 10, 12]]), np.array([[1, 2], [3, 4]])
        inputs = [triton.InferInput("x", [*x.shape], "FP32"), triton.InferInput("n", [*n.shape], "INT64")]
        for tensor, values in zip(inputs, (x, n), strict=True):
            tensor.set_data_from_numpy(values, binary_data=binary)
        outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("half", "total")]
        found = client.infer("numbers", inputs, outputs=outputs, request_id="seven")
        assert (found.as_numpy("half") == x / 2).all() and (found.as_numpy("total") == n.sum(1)).all()
        assert found.get_response()["id"] == "seven"
        with pytest.raises(InferenceServerException, match="inputs: expected x, n, each once"):
            client.infer("numbers", inputs[:1])


def test_tritons_own_client_sends_pictures(front: FrontServer) -> None:
    files = np.array([encoded(np.full((8, 8, 3), value, np.uint8), ".png") for value in (3, 200)], np.object_)
    with triton.InferenceServerClient(f"127.0.0.1:{front.port}") as client:
        image = triton.InferInput("image", [2], "BYTES")
        image.set_data_from_numpy(files)
        scores = client.infer("photos", [image]).as_numpy("scores")
    assert scores.shape == (2, 3) and np.allclose(scores.sum(1), 1, atol=1e-5)
    with closing(front.connect()) as connection:
        own = [ask(connection, "POST", "/models/photos/predict", file, content_type="image/png") for file in files]
    assert np.allclose(scores, [answer.json["predictions"][0]["scores"] for answer in own], atol=1e-5)

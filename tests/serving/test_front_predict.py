"""`/predict` against a real server: what is answered, and what is told of everything that can't be."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from front_bundles import LABELS, encoded
from front_server import FrontServer, ask, now, until

from serving.bundle import Bundle
from serving.predictor import Predictor, read_golden

ZEROS = np.zeros((8, 8), int).tolist()


def error(answer: Any) -> tuple[int, str, str]:
    """(status, message, field), having looked at the form."""
    content = answer.json["error"]
    assert set(content) in ({"code", "message", "field"}, {"code", "message"}), content
    assert "\n" not in content["message"] and "Traceback" not in content["message"] and len(content["message"]) < 600
    assert answer.headers["content-type"] == "application/json" and answer.headers["x-request-id"]
    return answer.status, content["message"], content.get("field", "")


@pytest.mark.parametrize("name", ["digits", "photos", "numbers"])
def test_the_golden_requests_get_the_golden_answers(front: FrontServer, front_folders: Path, name: str) -> None:
    bundle = Bundle.read(front_folders / name)
    requests, wanted = read_golden(bundle)
    predictor = Predictor.open(bundle)
    answer = front.predict(*requests, model=name)
    assert answer.status == 200 and answer.headers["x-model-version"] == bundle.version
    assert answer.json["model"] == name and answer.json["version"] == bundle.version
    assert len(answer.json["predictions"]) == len(requests)
    for prediction, rows in zip(answer.json["predictions"], wanted, strict=True):
        expected = predictor.render(tuple(rows))
        for key, value in expected.items():
            if isinstance(value, str):
                assert prediction[key] == value
            else:
                np.testing.assert_allclose(prediction[key], value, atol=1e-5)


def test_the_first_model_without_its_name(front: FrontServer) -> None:
    answer = front.predict(ZEROS)
    prediction = answer.json["predictions"][0]
    assert answer.status == 200 and answer.json["model"] == "digits"
    assert prediction["label"] == LABELS[prediction["index"]] and len(prediction["scores"]) == 10


def test_whole_floats_are_whole_numbers(front: FrontServer) -> None:
    ones = [[1] * 8] * 8
    floats = front.predict([[1.0] * 8] * 8).json["predictions"]
    assert floats == front.predict(ones).json["predictions"]
    assert front.predict({"x": [1, 2, 3], "n": [2**62 + 1, 1.0]}, model="numbers").json["predictions"][0]["total"] == (
        2**62 + 2
    )


def test_top(front: FrontServer) -> None:
    for body in (
        {"instances": [ZEROS], "top": 3},
        {"instances": [ZEROS], "top": 3.0},
        {"instances": [ZEROS], "parameters": {"top": 3, "other": 1}},
    ):
        best = front.ask("POST", "/predict", body).json["predictions"][0]
        assert len(best["top"]) == 3 and best["top"][0]["label"] == best["label"] and "scores" not in best


def test_a_picture_as_bytes_as_base64_and_as_pixels(front: FrontServer) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (8, 8)).astype(np.uint8)
    data = encoded(pixels, ".png")
    answers = [
        front.predict(pixels.tolist()),
        front.predict({"b64": base64.b64encode(data).decode()}),
        front.ask("POST", "/predict", data, content_type="image/png"),
        front.ask("POST", "/predict", data, content_type="application/octet-stream"),
        front.ask("POST", "/invocations", data, content_type="Image/PNG"),
    ]
    assert {answer.status for answer in answers} == {200}
    assert len({json.dumps(answer.json["predictions"]) for answer in answers}) == 1


def test_odd_names_and_spellings(front: FrontServer) -> None:
    for path in ("/models/a%20name%2Fwith%20%C3%BC/predict", "/models/a%20name%2fwith%20%c3%bc/predict"):
        assert front.ask("POST", path, {"instances": [ZEROS]}).json["model"] == "a name/with ü"
    assert front.ask("POST", "/models/%64igits/predict?x=1", {"instances": [ZEROS]}).status == 200
    assert front.ask("GET", "/ping").json == front.ask("GET", "/ready").json


@pytest.mark.parametrize(
    ("body", "status", "field", "says"),
    [
        (b"", 400, "", "empty"),
        (b"{", 400, "", "no JSON"),
        (b'{"instances": [1}', 400, "", "no JSON"),
        (b"\xff\xfe", 400, "", "no JSON"),
        (b'{"instances": [[NaN]]}', 400, "", "no JSON"),
        (b'{"instances": [[Infinity]]}', 400, "", "no JSON"),
        (b'{"instances": [1e999]}', 400, "", ""),
        (b'{"instances": [' + b"9" * 5000 + b"]}", 400, "", ""),
        (b"[" * 100_000, 400, "", "Expected `object`"),
        (b'{"instances": ' + b"[" * 100_000, 400, "", "nested too deeply"),
        (b'{"instances": ' + b"[" * 500 + b"]" * 500 + b"}", 400, "", ""),
        (b"[]", 400, "", "Expected `object`"),
        (b"null", 400, "", "Expected `object`"),
        (b"{}", 400, "", "instances"),
        (b'{"instances": 3}', 400, "instances", "Expected `array`"),
        (b'{"instances": []}', 400, "instances", "at least one"),
        (b'{"instances": [[]], "more": 1}', 400, "", "more"),
        (b'{"instances": [1], "top": 0}', 400, "top", "from 1"),
        (b'{"instances": [1], "top": 1e300}', 400, "top", "from 1"),
        (b'{"instances": [1], "top": 1, "parameters": {"top": 0}}', 400, "top", "from 1"),
        (b'{"instances": [1], "top": 1.5}', 400, "top", "whole number"),
        (b'{"instances": [1], "top": "a"}', 400, "top", "int"),
        (b'{"instances": [null]}', 400, "instances[0]", "expected pixels [8, 8]"),
        (b'{"instances": ["text"]}', 400, "instances[0]", "expected pixels [8, 8]"),
        (b'{"instances": [[[1, 2], [3]]]}', 400, "instances[0]", "different lengths"),
        (b'{"instances": [[[1, 2], [3, 4]]]}', 400, "instances[0]", "[2, 2]; expected pixels [8, 8]"),
        (b'{"instances": [{"b64": "!"}]}', 400, "instances[0].b64", "no base64"),
        (b'{"instances": [{"b64": ""}]}', 422, "instances[0].b64", "empty"),
        (b'{"instances": [{"b64": "aGVsbG8="}]}', 422, "instances[0].b64", "not a picture"),
        (b'{"instances": [{"url": "http://x"}]}', 400, "instances[0]", "'url'"),
        (b'{"instances": [1, 2], "instances": [{}]}', 400, "instances[0]", "expected pixels"),
    ],
)
def test_bad_bodies(front: FrontServer, body: bytes, status: int, field: str, says: str) -> None:
    found = error(front.ask("POST", "/predict", body, content_type="application/json"))
    assert found[0] == status and says in found[1], found
    assert found[2].startswith(field), found


@pytest.mark.parametrize(
    ("pixel", "says"), [(0.5, "whole number"), (-1, "-1"), (256, "256"), (True, "whole"), ("a", "whole"), (None, "")]
)
def test_bad_pixels(front: FrontServer, pixel: Any, says: str) -> None:
    instance = [[pixel] * 8] * 8
    status, message, field = error(front.predict(ZEROS, instance))
    assert status == 400 and says in message and field == "instances[1]"


@pytest.mark.parametrize(
    ("instance", "field", "says"),
    [
        ([1, 2, 3], "instances[0]", "expected an object with x, n"),
        ({"x": [1, 2, 3]}, "instances[0]", "expected an object with x, n"),
        ({"x": [1, 2, 3], "n": [1, 2], "z": 1}, "instances[0]", "expected an object with x, n"),
        ({"x": [1, 2], "n": [1, 2]}, "instances[0].x", "shape [2]; expected float32 [3]"),
        ({"x": [1, 2, "3"], "n": [1, 2]}, "instances[0].x", "no number"),
        ({"x": [1, 2, 1e39], "n": [1, 2]}, "instances[0].x", "out of range"),
        ({"x": [1, 2, 3], "n": [1, 2.5]}, "instances[0].n", "no whole number"),
        ({"x": [1, 2, 3], "n": [1, 2**70]}, "instances[0].n", ""),
        ({"x": [1, 2, 10**400], "n": [1, 2]}, "instances[0].x", "no number"),
    ],
)
def test_bad_tensors(front: FrontServer, instance: Any, field: str, says: str) -> None:
    status, message, where = error(front.predict(instance, model="numbers"))
    assert status == 400 and where == field and says in message, (message, where)


def test_an_answer_that_is_no_number_is_the_servers_fault(front: FrontServer) -> None:
    assert error(front.predict({"x": [77, 0, 0], "n": [1, 1]}, model="numbers"))[:2] == (
        500,
        "the model's answer holds NaN or an infinity",
    )
    assert front.predict({"x": [1, 0, 0], "n": [1, 1]}, model="numbers").status == 200


def test_bytes_for_a_model_of_tensors(front: FrontServer) -> None:
    answer = front.ask("POST", "/models/numbers/predict", b"\xff\xd8\xff", content_type="image/jpeg")
    assert error(answer)[0] == 415


@pytest.mark.parametrize("data", [b"", b"hello", encoded(np.zeros((9, 9, 3), np.uint8))[:200], bytes(1000)])
def test_bytes_that_are_no_picture(front: FrontServer, data: bytes) -> None:
    answer = front.ask("POST", "/models/photos/predict", data, content_type="image/jpeg", content_length=str(len(data)))
    assert error(answer)[0] == 422


def bomb(width: int, height: int) -> bytes:
    """A PNG of that many black pixels in a few hundred bytes for each million."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + width)) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_zip_bomb_of_a_picture(front: FrontServer) -> None:
    data = bomb(20_000, 20_000)
    assert len(data) < 1_000_000
    began = now()
    status, message, _ = error(front.ask("POST", "/models/photos/predict", data, content_type="image/png"))
    assert status == 422 and message and now() - began < 20
    assert front.ask("POST", "/models/photos/predict", bomb(900, 900), content_type="image/png").status == 200


def test_bad_samples_leave_the_others_of_their_batch_alone(front: FrontServer) -> None:
    good = front.predict(ZEROS).json["predictions"]
    bad = {"b64": base64.b64encode(b"no picture").decode()}
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda i: front.predict(bad if i % 4 == 0 else ZEROS), range(64)))
    assert [answer.status for answer in answers] == [422 if i % 4 == 0 else 200 for i in range(64)]
    for answer in answers:
        if answer.status == 200:
            np.testing.assert_allclose(answer.json["predictions"][0]["scores"], good[0]["scores"], atol=1e-5)


def test_too_large(front: FrontServer) -> None:
    assert error(front.predict(*[ZEROS] * 600))[::2] == (413, "instances")
    answer = front.raw(b"POST /predict HTTP/1.1\r\nHost: h\r\nContent-Length: 1073741824\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ") and b'"code":"too_large"' in answer


@pytest.mark.parametrize(
    ("headers", "status", "says"),
    [
        ({"content_type": "text/csv"}, 415, "text/csv"),
        ({"content_type": "application/x-www-form-urlencoded"}, 415, "send application/json"),
        ({"content_encoding": "gzip"}, 415, "without Content-Encoding"),
        ({"x_deadline_ms": "soon"}, 400, "milliseconds"),
        ({"x_deadline_ms": "nan"}, 400, "milliseconds"),
        ({"x_deadline_ms": "-5"}, 400, "milliseconds"),
    ],
)
def test_bad_headers(front: FrontServer, headers: dict[str, str], status: int, says: str) -> None:
    found = error(front.predict(ZEROS, **headers))
    assert found[0] == status and says in found[1]


def test_a_body_needs_a_length(front: FrontServer) -> None:
    answer = front.raw(b"POST /predict HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 411 ")


def test_a_deadline_that_has_passed(front: FrontServer) -> None:
    assert error(front.predict(ZEROS, x_deadline_ms="0.001"))[0] == 504
    assert front.predict(ZEROS, x_deadline_ms="60000").status == 200


def test_unknown_paths_models_and_methods(front: FrontServer) -> None:
    status, message, _ = error(front.predict(ZEROS, model="nobody"))
    assert status == 404 and "'nobody'" in message and "digits" in message
    for path in ("/nothing", "/predict/", "/models", "/models/digits", "/v1/chat/completions", "/%ff", "/../etc"):
        assert front.ask("GET", path).status == 404
    answer = front.ask("GET", "/predict")
    assert error(answer)[0] == 405 and answer.headers["allow"] == "POST"
    assert front.ask("DELETE", "/health").headers["allow"] == "GET, HEAD"
    assert front.ask("OPTIONS", "/predict").status == 405


def test_request_ids(front: FrontServer) -> None:
    assert front.predict(ZEROS, x_request_id="mine-1:a/b").headers["x-request-id"] == "mine-1:a/b"
    for insane in ("a b", "ü".encode().decode("latin-1"), "x" * 200, '"', ""):
        assert front.predict(ZEROS, x_request_id=insane).headers["x-request-id"] != insane
    assert len({front.ask("GET", "/health").headers["x-request-id"] for _ in range(5)}) == 5


def test_one_connection_for_many_requests(front: FrontServer) -> None:
    connection = front.connect()
    for i in range(20):
        answer = ask(connection, "POST", "/predict", {"instances": [ZEROS if i % 2 else "bad"]})
        assert answer.status == (200 if i % 2 else 400)
    connection.close()


def test_probes_and_pages(front: FrontServer) -> None:
    assert front.ask("GET", "/health").json == {"status": "live"}
    ready = front.ask("GET", "/ready").json
    assert ready["status"] == "ready" and [m["name"] for m in ready["models"]][:3] == ["digits", "photos", "numbers"]
    page = front.ask("GET", "/docs")
    assert page.headers["content-type"].startswith("text/html") and b"openapi.json" in page.body
    assert b"//" not in page.body.replace(b"</", b"")  # nothing from elsewhere
    tags = [tag["name"] for tag in front.ask("GET", "/openapi.json").json["tags"]]
    assert tags[:2] == ["digits", "photos"] and tags[-2:] == ["probes", "Open Inference Protocol v2"]
    assert front.ask("GET", "/").headers["location"] == "/docs"
    head = front.ask("HEAD", "/ready")
    assert head.status == 200 and head.body == b"" and int(head.headers["content-length"]) > 10
    assert "access-control-allow-origin" not in front.ask("GET", "/health", origin="http://elsewhere").headers


def test_what_is_counted_and_logged(front: FrontServer) -> None:
    version = front.predict(ZEROS).json["version"]
    name = f'{{code="200",model="digits",version="{version}"}}'
    before = front.metric(f"serving_requests_total{name}")
    samples = front.metric(f'serving_batch_size_sum{{model="digits",version="{version}"}}')
    answer = front.predict(ZEROS, ZEROS, x_request_id="counted")
    label = answer.json["predictions"][0]["label"]
    assert front.metric(f"serving_requests_total{name}") == before + 1
    assert front.metric(f'serving_batch_size_sum{{model="digits",version="{version}"}}') == samples + 2
    assert front.metric(f'serving_predictions_total{{label="{label}",model="digits",version="{version}"}}') >= 2
    assert front.metric('serving_workers{model="digits",state="up"}') == 1
    assert front.metric('serving_requests_in_flight{model="digits"}') == 0
    bundle = f'serving_bundle_info{{lineage="abc",model="digits",run="20260101-000000-test",version="{version}"}}'
    assert front.metric(bundle) == 1
    log = front.log.parent / "requests.jsonl"

    def line() -> Any:
        return [found for text in log.read_text().splitlines() if (found := json.loads(text))["id"] == "counted"]

    found = until(line, "the log's line")[0]
    score = answer.json["predictions"][0]["score"]
    assert found["status"] == 200 and found["model"] == "digits" and found["version"] == version
    assert found["count"] == 2 and found["predictions"] == [[label, score]] * 2 and 0 < found["ms"] < 60_000
    assert "inputs_sha256" not in found and "key" not in found

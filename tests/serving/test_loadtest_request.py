"""What is sent: URLs, headers with secrets by reference, bodies; and objectives from a file. Mistakes are one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from known_server import bundle

from serving.errors import Mistake
from serving.loadtest import slo
from serving.loadtest.answers import difference
from serving.loadtest.request import from_bundle, parse_headers, parse_url


@pytest.mark.parametrize(
    ("text", "has_body", "url"),
    [
        ("http://host:8000", True, "http://host:8000/predict"),
        ("host:8000/", True, "http://host:8000/predict"),
        ("http://host:8000", False, "http://host:8000/"),
        ("https://host/v2/models/m/infer?x=1", True, "https://host/v2/models/m/infer?x=1"),
        ("http://[::1]:9/health", False, "http://[::1]:9/health"),
    ],
)
def test_urls(text: str, has_body: bool, url: str) -> None:
    assert parse_url(text, has_body).url == url


@pytest.mark.parametrize(
    "text", ["ftp://host/", "http://", "http://host:port/", "http://a:b@host/", "http://ho st/", ""]
)
def test_what_is_no_url_is_told(text: str) -> None:
    with pytest.raises(Mistake):
        parse_url(text, True)


def test_secrets_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("from the file\n")
    monkeypatch.setenv("LOAD_KEY", "from the environment")
    lines = [f"Authorization: @{tmp_path / 'key'}", "X-Api-Key: $LOAD_KEY", "X-Deadline-Ms: 100"]
    expected = {"Authorization": "from the file", "X-Api-Key": "from the environment", "X-Deadline-Ms": "100"}
    assert parse_headers(lines) == expected


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("Authorization: Bearer abc", "give a secret as"),
        ("x-api-key: abc", "give a secret as"),
        ("X-Api-Key: $NO_SUCH_VARIABLE", "no variable 'NO_SUCH_VARIABLE'"),
        ("X-Api-Key: @/no/such/file", "can't be read"),
        ("no colon", "Name: value"),
        ("bad name: x", "Name: value"),
        ("X-A: a\r\nX-B: b", "characters"),
    ],
)
def test_headers_that_will_not_do(line: str, said: str) -> None:
    with pytest.raises(Mistake, match=said) as caught:
        parse_headers([line])
    assert "Bearer abc" not in str(caught.value)


def test_a_bundles_golden_requests_come_with_their_answers(tmp_path: Path) -> None:
    payloads, tolerance = from_bundle(bundle(tmp_path / "bundle"))
    assert len(payloads) == 5 and tolerance == 1e-4
    assert json.loads(payloads[3].body or b"") == {"instances": [[3.0, 1.0]]}
    assert payloads[3].expected == {"predictions": [{"value": [1.0, 2.0]}]}


def test_answers_are_compared_within_the_tolerance() -> None:
    expected = {"predictions": [{"label": "a", "index": 0, "scores": [0.25, 100.0]}]}

    def told(label: str = "a", first: float = 0.25, second: float = 100.0) -> str | None:
        answer = {"model": "m", "predictions": [{"label": label, "index": 0, "scores": [first, second]}]}
        return difference(json.dumps(answer).encode(), expected, 1e-3)

    assert told() is told(first=0.2509) is told(second=100.09) is None
    assert told(first=0.252) == "predictions[0].scores[0] is 0.252, not 0.25"
    assert told(second=100.2) and told("b") and told(first=np.nan)
    assert difference(b"<html>", expected, 1) == "the answer is no JSON"
    assert difference(b"[]", expected, 1) == "the answer is no object"
    assert difference(b'{"predictions": []}', expected, 1) == "predictions is no list of 1"
    assert difference(b'{"predictions": [{"label": "a"}]}', expected, 1) == "predictions[0].index is missing"


def test_objectives_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "slo.yaml"
    file.write_text("p95_ms: 50\nerror_rate: 0.01\nmin_rps: 90\n")
    found = slo.read(file)
    measured: dict[str, float | None] = {"p50_ms": 1, "p95_ms": 50.0, "p99_ms": 900, "error_rate": 0.02, "min_rps": 80}
    assert {check.name: check.ok for check in found.check(measured)} == {
        "p95_ms": True,
        "error_rate": False,
        "min_rps": False,
    }
    assert str(found.check(measured)[2]) == "min_rps 80 < 90"
    nothing: dict[str, float | None] = {**measured, "p95_ms": None}
    assert not found.check(nothing)[0].ok


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("p95: 50", "unknown key 'p95', did you mean 'p95_ms'"),
        ("p95_ms: fast", "p95_ms: 'fast' is no limit"),
        ("p95_ms: .nan", "is no limit"),
        ("p95_ms: true", "is no limit"),
        ("min_rps: -1", "is no limit"),
        ("error_rate: 5", "at most 1"),
        ("- p95_ms", "write limits as"),
        ("", "write limits as"),
        ("a: [", "no YAML"),
        ("!!python/object/apply:os.system [ls]", "no YAML"),
    ],
)
def test_a_file_of_objectives_is_strict(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "slo.yaml"
    file.write_text(text)
    with pytest.raises(Mistake, match=said.replace("[", r"\[")):
        slo.read(file)
    with pytest.raises(Mistake, match="can't be read"):
        slo.read(tmp_path / "none.yaml")

"""Keys, rates and TLS: the files alone, and a real server with all of them."""

from __future__ import annotations

import hashlib
import http.client
import json
import signal
import ssl
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from front_server import Answer, FrontServer, ask, until

from serving.errors import Mistake
from serving.front.access import MOST_BUCKETS, Buckets, Keys

ZEROS = np.zeros((8, 8), int).tolist()
ALICE, BOB, ROOT = "alice-0123456789abcdef", "bob-0123456789abcdefgh", "root-0123456789abcdefgh"


def test_keys_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    digest = hashlib.sha256(BOB.encode()).hexdigest()
    file.write_text(f"# those of the team\nalice {ALICE}  # laptop\n\nbob sha256:{digest}\n{ROOT}\n")
    keys = Keys.read(file)
    assert [keys.name_of(key.encode()) for key in (ALICE, BOB, ROOT)] == ["alice", "bob", "key-5"]
    assert keys.name_of(b"") is None and keys.name_of(digest.encode()) is None
    assert ALICE not in repr(keys)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no key"),
        ("alice short", ":1: a key has at least 16"),
        (f"a b {ALICE}", ":1: expected `NAME KEY`"),
        (f"{ALICE}\nagain {ALICE}", ":2: the same key"),
        ("x sha256:abc", ":1: sha256: wants 64"),
    ],
)
def test_bad_files_of_keys_are_told_without_the_key(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(Mistake) as caught:
        Keys.read(file)
    assert says in str(caught.value) and ALICE not in str(caught.value)


def test_a_bucket_holds_a_second_and_fills_again() -> None:
    buckets = Buckets(10)
    assert [buckets.take("a", 0.0) for _ in range(10)] == [0.0] * 10
    assert buckets.take("a", 0.0) == pytest.approx(0.1) and buckets.take("b", 0.0) == 0.0
    assert buckets.take("a", 0.1) == 0.0 and buckets.take("a", 0.1) > 0
    assert sum(buckets.take("a", 100.0) == 0 for _ in range(20)) == 10
    slow = Buckets(0.5)
    assert slow.take("a", 0.0) == 0.0 and slow.take("a", 1.0) == pytest.approx(1.0) and slow.take("a", 2.0) == 0.0


def test_buckets_are_bounded() -> None:
    buckets = Buckets(1)
    for i in range(MOST_BUCKETS + 100):
        buckets.take(str(i), 0.0)
    assert len(buckets._clients) == MOST_BUCKETS


class Guarded:
    """A server with keys, a rate limit and TLS."""

    def __init__(self, server: FrontServer, certificate: Path, keys: Path) -> None:
        self.server, self.keys = server, keys
        self._context = ssl.create_default_context(cafile=str(certificate))

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        connection = http.client.HTTPSConnection("localhost", self.server.port, timeout=60, context=self._context)
        try:
            return ask(connection, method, path, body, **headers)
        finally:
            connection.close()

    def predict(self, **headers: str) -> Answer:
        return self.ask("POST", "/predict", {"instances": [ZEROS]}, **headers)


@pytest.fixture(scope="module")
def guarded(front_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    certificate, key = folder / "cert.pem", folder / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subprocess.run(["openssl", "req", "-x509", *curve, *files, *subject], check=True, capture_output=True)
    keys = folder / "keys"
    keys.write_text(f"alice {ALICE}\nbob {BOB}\n")
    (folder / "admins").write_text(f"root {ROOT}\n")
    options = ["--api-keys", keys, "--admin-keys", folder / "admins", "--tls-cert", certificate, "--tls-key", key]
    options += ["--rate-limit", "40", "--request-log", folder / "log", "--request-log-hash"]
    server = FrontServer(folder, front_folders / "digits", *options)
    yield Guarded(server, certificate, keys)
    server.close()
    told = server.log.read_text() + (folder / "log").read_text()
    assert not any(secret in told for secret in (ALICE, BOB, ROOT))


def test_a_key_is_needed_for_predictions_and_not_for_probes(guarded: Guarded) -> None:
    for path in ("/health", "/ready", "/metrics", "/docs", "/openapi.json", "/v2/health/ready"):
        assert guarded.ask("GET", path).status == 200
    for headers in ({}, {"X_API_Key": "x" * 20}, {"authorization": f"Basic {ALICE}"}, {"authorization": "Bearer"}):
        answer = guarded.predict(**headers)
        assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert answer.json["error"]["code"] == "unauthorized"
    assert guarded.ask("GET", "/v2/models/digits").status == 401
    assert guarded.predict(X_API_Key=ALICE).status == 200
    assert guarded.predict(authorization=f"bearer {BOB}").status == 200
    assert guarded.predict(X_API_Key=ROOT).status == 200


def test_loading_needs_an_admins_key(guarded: Guarded) -> None:
    path = "/v2/repository/models/digits/load"
    assert guarded.ask("POST", path).status == 401
    assert guarded.ask("POST", path, X_API_Key=ALICE).status == 401
    assert guarded.ask("POST", path, X_API_Key=ROOT).status == 200


def test_the_document_tells_of_keys(guarded: Guarded) -> None:
    document = guarded.ask("GET", "/openapi.json").json
    assert document["paths"]["/predict"]["post"]["security"] == [{"bearer": []}, {"header": []}]
    assert "security" not in document["paths"]["/health"]["get"]


def test_the_log_names_the_key_and_hashes_the_body(guarded: Guarded) -> None:
    body = json.dumps({"instances": [ZEROS]}).encode()
    guarded.predict(X_API_Key=ALICE, X_Request_Id="hashed")
    log = guarded.server.log.parent / "log"
    line = until(lambda: [text for text in log.read_text().splitlines() if '"hashed"' in text], "the line")[0]
    assert json.loads(line)["key"] == "alice" and json.loads(line)["inputs_sha256"] == hashlib.sha256(body).hexdigest()


def test_each_key_has_its_rate(guarded: Guarded) -> None:
    def some(_: int) -> Answer:
        return guarded.ask("GET", "/v2/models/digits", X_API_Key=BOB)

    with ThreadPoolExecutor(8) as pool:
        answers = until(lambda: [a for a in pool.map(some, range(200)) if a.status != 200], "a refusal")
    assert {answer.status for answer in answers} == {429}
    assert int(answers[0].headers["retry-after"]) >= 1 and "too many requests" in answers[0].json["error"]
    assert guarded.predict(X_API_Key=ALICE).status == 200
    assert guarded.ask("GET", "/health").status == 200
    until(lambda: guarded.predict(X_API_Key=BOB).status == 200, "bob's next token")


def test_keys_are_read_again_on_sighup(guarded: Guarded) -> None:
    new = "carol-0123456789abcdef"
    before = guarded.keys.read_text()
    guarded.keys.write_text("")
    guarded.server.process.send_signal(signal.SIGHUP)
    until(lambda: "holds no key; what was read before stays" in guarded.server.log.read_text(), "the complaint")
    assert guarded.predict(X_API_Key=ALICE).status == 200
    guarded.keys.write_text(before + f"carol {new}\n")
    guarded.server.process.send_signal(signal.SIGHUP)
    until(lambda: guarded.predict(X_API_Key=new).status == 200, "the new key")


def test_plain_http_to_a_tls_port_gets_nothing(guarded: Guarded) -> None:
    assert b"HTTP/1.1 200" not in guarded.server.raw(b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n")
    assert guarded.ask("GET", "/health").status == 200

"""A server's life: what it refuses to begin with, reloads under traffic, overload, lost workers, and its end."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import front_bundles
import numpy as np
import psutil
import pytest
from front_server import Answer, FrontServer, ask, now, run_serving, until
from harness import environment

from serving.bundle import Bundle

ZEROS = np.zeros((8, 8), int).tolist()


@pytest.fixture(scope="module")
def slow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return front_bundles.slow(tmp_path_factory.mktemp("slow") / "slow").path


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "the following arguments are required: BUNDLE"),
        (["nowhere"], "nowhere: no bundle: there is no such folder; make one with: trainer export"),
        (["{digits}", "{digits}"], "a model 'digits' is served already: give it another name, NAME="),
        (["=x"], "expected a bundle's folder, or NAME=FOLDER"),
        (["{digits}", "--port", "70000"], "argument --port: '70000': expected a whole number from 0 to 65535"),
        (["{digits}", "--port", "{used}"], "Address already in use; another --port"),
        (["{digits}", "--host", "256.1.1.1"], "256.1.1.1:8000 can't be listened on"),
        (["{digits}", "--workers", "0"], "argument --workers: '0': expected a whole number from 1"),
        (["{digits}", "--max-wait-ms", "nan"], "argument --max-wait-ms: 'nan': expected a number"),
        (["{digits}", "--rate-limit", "0"], "argument --rate-limit: '0'"),
        (["{digits}", "--device", "abacus"], "--device 'abacus': expected cpu, cuda, or auto"),
        (["{digits}", "--tls-cert", "x"], "--tls-key is missing"),
        (["{digits}", "--tls-cert", "x", "--tls-key", "y"], "--tls-cert x, --tls-key y: can't be used"),
        (["{digits}", "--api-keys", "x"], "x: can't be read (No such file"),
        (["{digits}", "--request-log", "/nowhere/x"], "--request-log /nowhere/x: can't be opened"),
        (["{digits}", "--alias", "ping"], "--alias 'ping': expected NEW=OLD"),
        (["{digits}", "--alias", "/a=/b"], "--alias /a=/b: there is no path /b"),
        (["{digits}", "--alias", "/a=/models/x/predict"], "--alias /a=/models/x/predict: there is no path"),
        (["{digits}", "--wokers", "2"], "unrecognized arguments: --wokers"),
        (["{newer}"], "made in bundle format 99, and this version reads up to 1: upgrade the server"),
        (["{cut}"], "bundle.json is damaged"),
    ],
)
def test_what_can_not_begin_says_so_in_one_line(
    front_folders: Path, tmp_path: Path, args: list[str], says: str
) -> None:
    for name in ("newer", "cut"):
        shutil.copytree(front_folders / "digits", tmp_path / name)
    manifest = tmp_path / "newer" / "bundle.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 99'))
    (tmp_path / "cut" / "bundle.json").write_text(manifest.read_text()[:100])
    with socket.create_server(("127.0.0.1", 0)) as used:
        places = {"digits": front_folders / "digits", "used": used.getsockname()[1], "newer": "newer", "cut": "cut"}
        done = run_serving(tmp_path, *[arg.format(**places) for arg in args])
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("trainer: error: ") and done.stderr.count("\n") == 1, done.stderr
    assert says in done.stderr


def test_a_bundle_with_one_byte_changed_is_not_served(front_folders: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(front_folders / "digits", tmp_path / "changed")
    file = "program.pt2"
    data = bytearray((folder / file).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / file).write_bytes(data)
    done = run_serving(tmp_path, folder, "--port", "0", "--json")
    assert done.returncode == 2 and f"{file} is not the file that was exported" in done.stderr
    assert json.loads(done.stdout)["error"] in done.stderr


def test_neither_trainer_nor_torch_is_in_the_front() -> None:
    code = (
        "import sys; import serving.__main__, serving.front.server\n"
        "names = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(names & {'trainer', 'recipes', 'lightning', 'torch', 'cv2'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=60)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_trainer_serve_becomes_the_server_and_says_how_to_ask(front_folders: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trainer", "serve", str(front_folders / "digits"), "--port", "0", "--threads", "1"]
    log = tmp_path / "stderr"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=tmp_path, env=environment()
        )
    try:
        assert process.stdout is not None
        first, second = process.stdout.readline(), process.stdout.readline()
        assert first.startswith("serving digits ") and "golden requests: 8" in first
        assert "serving" in " ".join(psutil.Process(process.pid).cmdline())
        example = second.partition("try: ")[2]
        done = subprocess.run(["bash", "-c", example], capture_output=True, text=True, timeout=60)
        assert json.loads(done.stdout)["predictions"][0]["label"].startswith("digit "), done.stderr
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0 and log.read_text() == ""
    finally:
        process.kill()
        process.wait()


class Traffic:
    """Clients that ask without a pause, each on its connection, until they are told to stop."""

    def __init__(self, server: FrontServer, clients: int) -> None:
        self.answers: list[Answer] = []
        self.errors: list[Exception] = []
        self._server, self._stop = server, threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        connection = self._server.connect()
        while not self._stop.is_set():
            try:
                self.answers.append(ask(connection, "POST", "/predict", {"instances": [ZEROS]}))
            except Exception as error:
                self.errors.append(error)
                return
        connection.close()

    def wait(self, more: int) -> None:
        wanted = len(self.answers) + more
        until(lambda: self.errors or len(self.answers) >= wanted, f"{more} answers")

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)


@pytest.fixture(scope="module")
def moving(front_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FrontServer, Path, Path]]:
    """(a server of what a symlink points to, the symlink, a second version)."""
    folder = tmp_path_factory.mktemp("moving")
    second = front_bundles.digits(folder / "second", seed=1).path
    link = folder / "current"
    link.symlink_to(front_folders / "digits")
    server = FrontServer(folder / "server", link, "--watch", "--request-log", folder / "log", "--drain-seconds", "20")
    yield server, link, second
    server.close()


def point(link: Path, target: Path) -> None:
    new = link.with_name("next")
    new.symlink_to(target)
    new.rename(link)


def test_reloads_under_traffic_lose_no_request(moving: tuple[FrontServer, Path, Path], front_folders: Path) -> None:
    server, link, second = moving
    first_version = server.predict(ZEROS).json["version"]
    second_version = Bundle.read(second).version
    traffic = Traffic(server, 4)
    traffic.wait(20)
    point(link, second)  # --watch sees it
    until(lambda: server.ask("GET", "/ready").json["models"][0]["version"] == second_version, "the second version")
    traffic.wait(20)
    point(link, front_folders / "digits")
    server.process.send_signal(signal.SIGHUP)
    until(lambda: server.predict(ZEROS).json["version"] == first_version, "the first version again")
    traffic.wait(20)
    traffic.end()
    assert not traffic.errors and {answer.status for answer in traffic.answers} == {200}
    seen = {answer.json["version"]: answer.json["predictions"] for answer in traffic.answers}
    assert set(seen) == {first_version, second_version} and len({json.dumps(p) for p in seen.values()}) == 2
    assert server.metric('serving_reloads_total{result="done"}') >= 2
    assert f"digits: reloaded, {first_version} -> {second_version}" in server.log.read_text()


def test_a_bad_bundle_is_not_taken_and_the_old_one_goes_on(
    moving: tuple[FrontServer, Path, Path], front_folders: Path, tmp_path: Path
) -> None:
    server, link, _ = moving
    changed = shutil.copytree(front_folders / "digits", tmp_path / "changed")
    (changed / "golden.jsonl").write_text("{}\n")
    failed = server.metric('serving_reloads_total{result="failed"}')
    version = server.predict(ZEROS).json["version"]
    point(link, changed)
    until(lambda: server.metric('serving_reloads_total{result="failed"}') > failed, "the refusal")
    answer = server.ask("POST", "/v2/repository/models/digits/load")
    assert answer.status == 409 and "golden.jsonl is not the file" in answer.json["error"]
    assert server.predict(ZEROS).json["version"] == version
    assert f"digits: not reloaded, {version} goes on" in server.log.read_text()
    done = server.metric('serving_reloads_total{result="done"}')
    point(link, front_folders / "digits")
    until(lambda: server.metric('serving_reloads_total{result="done"}') > done, "the good one")


def test_the_request_log_is_opened_again_on_sighup(moving: tuple[FrontServer, Path, Path]) -> None:
    server, link, _ = moving
    log = link.parent / "log"
    log.rename(log.with_name("log.1"))
    server.process.send_signal(signal.SIGHUP)
    until(log.exists, "the new file")
    server.predict(ZEROS, x_request_id="after")
    until(lambda: '"after"' in log.read_text(), "the line")
    assert all(json.loads(line) for line in log.with_name("log.1").read_text().splitlines())


def workers(server: FrontServer) -> list[psutil.Process]:
    """The processes that run models: children of the server, all but the first, which forks them."""
    children = psutil.Process(server.process.pid).children()
    return sorted(children, key=lambda child: child.create_time())[1:]


def test_a_killed_worker_costs_its_requests_a_503_and_no_more(moving: tuple[FrontServer, Path, Path]) -> None:
    server, _, _ = moving
    until(lambda: len(workers(server)) == 1, "one worker")
    traffic = Traffic(server, 4)
    traffic.wait(20)
    before = workers(server)[0]
    before.send_signal(signal.SIGKILL)
    until(lambda: server.metric('serving_worker_restarts_total{model="digits"}') >= 1, "the restart")
    until(lambda: server.ask("GET", "/ready").status == 200, "readiness")
    traffic.wait(20)
    traffic.end()
    assert not traffic.errors and {answer.status for answer in traffic.answers} <= {200, 503}
    lost = [answer for answer in traffic.answers if answer.status == 503]
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in lost)
    assert all(answer.json["error"]["code"] == "worker_lost" for answer in lost), lost[:3]


def test_overload_deadlines_clients_that_hang_up_and_the_end(slow_folder: Path, tmp_path: Path) -> None:
    options = ["--queue", "3", "--max-batch", "1", "--deadline-ms", "30000", "--request-log", "/dev/full"]
    server = FrontServer(tmp_path, slow_folder, *options)
    try:
        with ThreadPoolExecutor(40) as pool:
            answers = list(pool.map(lambda _: server.predict([1.0]), range(40)))
        refused = [answer for answer in answers if answer.status == 503]
        assert {answer.status for answer in answers} == {200, 503} and len(refused) >= 10
        assert all(a.json["error"]["code"] == "overloaded" and int(a.headers["retry-after"]) >= 1 for a in refused)
        began = now()
        late = server.predict([1.0], [2.0], [3.0], x_deadline_ms="5")
        assert late.status == 504 and late.json["error"]["code"] == "deadline" and now() - began < 10
        gone = [server.socket() for _ in range(3)]
        for connection in gone:
            body = b'{"instances": [[1.0]]}'
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        until(lambda: server.metric('serving_requests_in_flight{model="slow"}') == 3, "three requests")
        for connection in gone:
            connection.close()
        until(lambda: server.metric('serving_requests_in_flight{model="slow"}') == 0, "their end")
        version = server.predict([1.0]).json["version"]
        assert server.metric(f'serving_requests_total{{code="499",model="slow",version="{version}"}}') >= 1
        _ends_after_its_answers(server)
    finally:
        server.close()
    assert server.log.read_text().count("the request log can't be written (No space left on device)") == 1


def _ends_after_its_answers(server: FrontServer) -> None:
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(server.predict, [float(i)]) for i in range(3)]
        until(lambda: server.metric('serving_requests_in_flight{model="slow"}') >= 2, "requests")
        server.process.send_signal(signal.SIGTERM)
        found = [answer.result() for answer in answers]
    assert {answer.status for answer in found} == {200}, found
    assert server.wait() == 0
    with pytest.raises(OSError):
        server.ask("GET", "/health")


def test_told_twice_it_ends_at_once(slow_folder: Path, tmp_path: Path) -> None:
    server = FrontServer(tmp_path, slow_folder, "--max-batch", "1", "--drain-seconds", "100")
    try:
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(server.predict, *[[1.0]] * 400, x_deadline_ms="100000")
            until(lambda: server.metric('serving_requests_in_flight{model="slow"}') == 1, "the request")
            server.process.send_signal(signal.SIGTERM)
            until(lambda: server.process.poll() is not None or not _accepts(server), "the end of listening")
            server.process.send_signal(signal.SIGTERM)
            assert server.wait(30) == 1
            assert answer.exception(60) is not None or answer.result().status == 503
        assert "1 requests that had no answer" in server.log.read_text()
    finally:
        server.close()


def test_told_while_it_starts(front_folders: Path, tmp_path: Path) -> None:
    server = FrontServer(tmp_path, front_folders / "digits", waits=False)
    try:
        until(lambda: psutil.Process(server.process.pid).children(), "the start")
        assert server.stop() == 0
        assert server.log.read_text() == ""
    finally:
        server.close()


def _accepts(server: FrontServer) -> bool:
    try:
        server.socket().close()
    except OSError:
        return False
    return True

"""Serving a model: ours against plain FastAPI, LitServe, mosec and `mlflow models serve`.

    python benchmarks/serving.py [--quick] [--json FILE] [--only small|resnet18] [--connections 8,64] [--seconds 10]

Two models with random weights: `small`, an MLP on 64 numbers of about a millisecond, and ResNet-18 on pictures of
224×224, of which each contender gets the same JPEG (as bytes; LitServe and MLflow as base64 in JSON, their form). Each
contender's own server answers `wrk` on the same cores, a closed loop at 1, 8, 64 and 256 connections, one contender
after the other in a new order each round. Every contender's answer is compared with the model's before it is timed,
and a server runs for two seconds before its first figure. Ours has validation, metrics and the request log on. FastAPI
calls the model in the handler; LitServe and mosec batch up to 32. None of the peers writes an access log.

`model alone` is the model in a loop of batches of 32, without a server, in the same rounds. A latency is wrk's, of a
closed loop, over all answers; errors are connections and answers that failed.
"""

from __future__ import annotations

import base64
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import Goal, Row, argument_parser, finish
from workloads import peer_environment, serving_load
from workloads.serving_load import Figures

ROOT = Path(__file__).resolve().parent.parent
PEER_PACKAGES = {
    "fastapi": "0.165.0",
    "uvicorn": "0.54.0",
    "uvloop": "0.23.0",
    "httptools": "0.9.0",
    "litserve": "0.2.19",
    "mosec": "0.9.8",
    "msgspec": "0.22.0",
}
PACKAGES = ("torch", "torchvision", "mlflow")
OURS, FASTAPI, LITSERVE, MOSEC, MLFLOW = "ours", "FastAPI", "LitServe", "mosec", "MLflow"
CONTENDERS = (OURS, FASTAPI, LITSERVE, MOSEC, MLFLOW)
ALONE = "model alone"
SMALL, RESNET = "small", "resnet18"
READY = {OURS: "/ready", FASTAPI: "/docs", LITSERVE: "/health", MOSEC: "/metrics", MLFLOW: "/ping"}
PATHS = {MLFLOW: "/invocations"}
SETTLE_SECONDS = 2.0
GOALS = {
    (SMALL, 64): {FASTAPI: 3.0, LITSERVE: 6.0, MOSEC: 0.8},
    (SMALL, 8): {FASTAPI: 1.0, LITSERVE: 1.0, MOSEC: 1.0, MLFLOW: 1.0},
    (RESNET, 64): {ALONE: 0.9},
}
"""Requests/s, ours ÷ the peer's, at least."""
FLOOR = {(SMALL, 64): {"rate": 3000.0, "p95": 40.0}}


@dataclass(frozen=True)
class Case:
    """A model, and what is measured of it."""

    model: str
    connections: tuple[int, ...]
    seconds: float
    bundle: Path
    mlflow_model: Path


Taken = Mapping[str, Mapping[int, Sequence[Figures]]]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--only", choices=(SMALL, RESNET), help="one of the models")
    parser.add_argument("--connections", type=_numbers, default=(1, 8, 64, 256), help="1,8,64,256")
    parser.add_argument("--contenders", type=_names, default=CONTENDERS, help=",".join(CONTENDERS))
    parser.add_argument("--seconds", type=float, help="of wrk at each number of connections (10, ResNet-18 20)")
    parser.add_argument("--rounds", type=int, help="5; 1 with --quick")
    arguments = parser.parse_args()
    if lacking := serving_load.missing():
        raise SystemExit(lacking)
    rounds = arguments.rounds or (1 if arguments.quick else 5)
    connections = (8, 64) if arguments.quick and arguments.connections == (1, 8, 64, 256) else arguments.connections
    models = [arguments.only] if arguments.only else [SMALL] if arguments.quick else [SMALL, RESNET]
    python = peer_environment.interpreter("serving", [f"{name}=={version}" for name, version in PEER_PACKAGES.items()])
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        for model in models:
            folder = Path(name, model)
            folder.mkdir()
            case = prepare(model, connections, arguments.seconds or _seconds(model, arguments.quick), folder, python)
            rows += rows_of(case, *measure(case, arguments.contenders, rounds, folder, python))
    finish("Serving", rows, arguments.json, PACKAGES, PEER_PACKAGES)


def prepare(model: str, connections: tuple[int, ...], seconds: float, folder: Path, python: Path) -> Case:
    """Write the bundle and MLflow's model, and the bodies of the requests."""
    from workloads import serving_models

    case = Case(model, connections, seconds, folder / "bundle", folder / "mlflow")
    _run([sys.executable, "-m", "workloads.serving_models", "bundle", model, str(case.bundle)])
    _run([str(python), "-m", "workloads.serving_mlflow", model, str(case.mlflow_model)])
    features, jpeg = serving_models.features(), serving_models.jpeg()
    text = base64.b64encode(jpeg).decode()
    for contender in CONTENDERS:
        if model == SMALL:
            body: object = {OURS: {"instances": [features]}, MLFLOW: {"inputs": [features]}}.get(
                contender, {"features": features}
            )
        else:
            body = {LITSERVE: {"image": text}, MLFLOW: {"inputs": [text]}}.get(contender, jpeg)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        (folder / f"{contender}.body").write_bytes(content)
    return case


def measure(
    case: Case, contenders: Sequence[str], rounds: int, folder: Path, python: Path
) -> tuple[Taken, list[dict[str, float]]]:
    """(figures by contender and connections, figures of the model alone), one of each a round."""
    taken: dict[str, dict[int, list[Figures]]] = {name: defaultdict(list) for name in contenders}
    alone: list[dict[str, float]] = []
    for _ in range(rounds):
        command = [sys.executable, "-m", "workloads.serving_models", "alone", case.model, str(case.seconds)]
        alone.append(json.loads(_run(command)))
        for contender in random.sample(list(contenders), len(contenders)):
            for connections, figures in one_turn(case, contender, folder, python).items():
                taken[contender][connections].append(figures)
                told = f"{figures.rate:.0f}/s, p95 {figures.p95:.1f} ms, errors {figures.errors or 'none'}"
                print(f"{case.model}, {contender}, {connections} connections: {told}", file=sys.stderr, flush=True)
    return taken, alone


def one_turn(case: Case, contender: str, folder: Path, python: Path) -> dict[int, Figures]:
    """Start the contender's server, compare its answer, load it at each number of connections."""
    port = _free_port()
    path = PATHS.get(contender, "/predict")
    body = folder / f"{contender}.body"
    kind = "application/json" if body.read_bytes()[:1] == b"{" else "image/jpeg"
    log = folder / f"{contender}.log"
    command = _command(contender, case, port, python, folder)
    with serving_load.running(command, _environment(case), folder, log, port, READY[contender]):
        check(case.model, contender, serving_load.ask(port, path, body.read_bytes(), kind))
        script = folder / "wrk.lua"
        serving_load.load(port, path, body, kind, 8, SETTLE_SECONDS, script)
        return {
            connections: serving_load.load(port, path, body, kind, connections, case.seconds, script)
            for connections in case.connections
        }


def check(model: str, contender: str, content: bytes) -> None:
    """Raises RuntimeError where the answer is not the model's own."""
    from workloads import serving_models

    found = json.loads(content)
    if "predictions" in found:
        found = found["predictions"][0]
    wanted = serving_models.expected(model)
    worst = max(abs(one - other) for one, other in zip(found["scores"], wanted, strict=True))
    label = serving_models.LABELS[wanted.index(max(wanted))]
    if worst > serving_models.TOLERANCE[model] or found["label"] != label:
        raise RuntimeError(f"{contender} answers {content[:300]!r}, which is {worst} off")


def rows_of(case: Case, taken: Taken, alone: Sequence[Mapping[str, float]]) -> list[Row]:
    rows = []
    for connections in case.connections:
        figures = {name: found[connections] for name, found in taken.items()}
        title = f"{case.model}, {connections} connections"
        errors = {name: [one.errors for one in found if one.errors] for name, found in figures.items()}
        rates = {name: [one.rate for one in found] for name, found in figures.items()}
        rates[ALONE] = [one["batched"] for one in alone]
        notes = {"errors": {name: kinds for name, kinds in errors.items() if kinds}}
        for name, kinds in notes["errors"].items():
            print(f"{title}: {name} had errors: {kinds}", file=sys.stderr)
        goals = [Goal(peer, ratio) for peer, ratio in GOALS.get((case.model, connections), {}).items() if peer in rates]
        rows.append(_row(title, "1/s", rates, "higher", goals[0] if goals else None, notes))
        for goal in goals[1:]:
            fewer = {name: rates[name] for name in rates if name in (OURS, goal.peer)}
            rows.append(_row(f"{title}, against {goal.peer}", "1/s", fewer, "higher", goal))
        rows += _floors(case, connections, figures.get(OURS, ()))
        for key in ("p50", "p95", "p99"):
            values = {name: [getattr(one, key) for one in found] for name, found in figures.items()}
            rows.append(_row(f"{title}: {key}", "ms", values, "lower"))
    single = {OURS: [one["single_ms"] for one in alone]}
    rows.append(_row(f"{case.model}: the model alone, one sample", "ms", single, "lower"))
    return [row for row in rows if row is not None]


def _floors(case: Case, connections: int, ours: Sequence[Figures]) -> list[Row | None]:
    """Goals that are figures of their own, written as a contender that always has them."""
    found: list[Row | None] = []
    for key, limit in FLOOR.get((case.model, connections), {}).items():
        is_rate = key == "rate"
        values = {OURS: [getattr(one, key) for one in ours], "required": [limit] * len(ours)}
        title = f"{case.model}, {connections} connections: {key}, required"
        found.append(_row(title, "1/s" if is_rate else "ms", values, "higher" if is_rate else "lower",
                          Goal("required", 1.0)))  # fmt: skip
    return found


def _row(
    title: str, unit: str, values: Mapping[str, Sequence[float]], better: str, goal: Goal | None = None,
    notes: Mapping[str, object] | None = None,
) -> Row | None:  # fmt: skip
    """None without our figures: a run of some peers alone has its lines on stderr."""
    peers = {name: found for name, found in values.items() if name != OURS}
    if not values.get(OURS):
        return None
    return Row(title, unit, values[OURS], peers, better, goal, notes or {})  # type: ignore[arg-type]


def _command(contender: str, case: Case, port: int, python: Path, folder: Path) -> list[str | Path]:
    if contender == OURS:
        log = folder / "requests.jsonl"
        log.unlink(missing_ok=True)
        return [sys.executable, "-m", "serving", case.bundle, "--port", str(port), "--request-log", log]
    if contender == MLFLOW:
        served = [python, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
        return [*served, "--model-uri", case.mlflow_model, "--host", "127.0.0.1", "--port", str(port)]
    return [python, "-m", f"workloads.serving_{contender.lower()}", case.model, str(port)]


def _environment(case: Case) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    # MLflow starts `uvicorn` by its name.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    own = {"BENCH_MODEL": case.model, "MLFLOW_DISABLE_TELEMETRY": "true", "PATH": path}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **own}


def _run(command: Sequence[str]) -> str:
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{command[:4]} failed: {done.stderr[-2000:]}")
    return done.stdout


def _seconds(model: str, is_quick: bool) -> float:
    """ResNet-18 answers some ten requests a second, and wrk counts whole answers only."""
    return (2.0 if model == SMALL else 6.0) if is_quick else (10.0 if model == SMALL else 20.0)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    by_lower = {name.lower(): name for name in CONTENDERS}
    return tuple(by_lower[part.strip().lower()] for part in text.split(","))


if __name__ == "__main__":
    main()

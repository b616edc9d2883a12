"""Load a server at a rate, and tell how quickly and how well it answers.

trainer loadtest URL --target-rps 1000 --duration 60 --golden BUNDLE
trainer loadtest URL --target-rps 200 --body picture.jpg --slo slo.yaml
trainer loadtest URL --target-rps 100 --slo slo.yaml --find-max

Requests are sent when they are due, however slow the server is, and latency counts from that moment. Exit code 1:
an objective is broken, no answer was right, or the generator was the bottleneck.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from serving.errors import Mistake
from serving.loadtest.slo import Objectives, read
from trainer.errors import EXIT_DONE, EXIT_FAILURE

if TYPE_CHECKING:
    from serving.loadtest.measure import Load, Measured
    from serving.loadtest.request import Request
    from serving.loadtest.summary import Summary

EXIT_INTERRUPTED = 130
MAX_REQUESTS = 50_000_000
"""Of one measurement: the records of all are held in memory, 18 bytes each."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="http://host:port/path; without a path, /predict")
    parser.add_argument("--target-rps", type=float, required=True, metavar="RATE", help="requests per second")
    parser.add_argument("--duration", type=float, default=60.0, metavar="SECONDS", help="how long to measure (60)")
    parser.add_argument("--warm-up", type=float, default=5.0, metavar="SECONDS", help="going up to the rate before (5)")
    parser.add_argument(
        "--arrivals", choices=("poisson", "constant"), default="poisson", help="how requests arrive (poisson)"
    )
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="processes that send (1)")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="SECONDS", help="for an answer (10)")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals (0)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--body", type=Path, metavar="FILE", help="send this file; its name says the content type")
    what.add_argument(
        "--golden", type=Path, metavar="BUNDLE", help="send a bundle's golden requests; other answers than its own fail"
    )
    parser.add_argument(
        "--header", action="append", default=[], metavar="'NAME: VALUE'",
        help="@FILE or $VARIABLE for the value of a secret; can be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--slo", type=Path, metavar="FILE", help="YAML: p50_ms, p95_ms, p99_ms, error_rate (0..1), min_rps"
    )
    parser.add_argument("--find-max", action="store_true", help="find the highest rate within --slo")
    parser.add_argument(
        "--step-seconds", type=float, default=10.0, metavar="SECONDS", help="of each step of --find-max (10)"
    )
    parser.add_argument("--plot", type=Path, default=Path("loadtest.png"), metavar="FILE", help="loadtest.png")
    parser.add_argument("--no-plot", action="store_true", help="write no plot")


def run(args: argparse.Namespace) -> int:
    load = _load(args)
    objectives = read(args.slo) if args.slo else Objectives()
    if args.find_max and not args.slo:
        raise Mistake("--find-max needs --slo FILE: the limits within which the highest rate is looked for")
    if not args.no_plot and not args.plot.absolute().parent.is_dir():
        raise Mistake(f"--plot {args.plot}: there is no folder {args.plot.absolute().parent}")
    request = _request(args)
    if args.find_max:
        return _find_max(args, request, load, objectives)
    from serving.loadtest import report
    from serving.loadtest.measure import Generators
    from serving.loadtest.summary import summarise

    _tell(args, report.heading(request, load, args.processes))
    with Generators(request, args.processes) as generators:
        measured = generators.measure(load)
    summary = summarise(measured)
    checks = objectives.check(summary.measured())
    for line in report.lines(summary):
        _tell(args, line)
    if args.slo:
        _tell(args, report.verdict(str(args.slo), checks))
    _plot(args, request, objectives, measured, summary)
    if args.json:
        slo = [vars(check) for check in checks]
        print(json.dumps({"url": request.target.url, "load": vars(load), **summary.as_json(), "slo": slo}))
    if summary.interrupted:
        return EXIT_INTERRUPTED
    return EXIT_FAILURE if summary.invalid or not summary.right or not all(check.ok for check in checks) else EXIT_DONE


def _find_max(args: argparse.Namespace, request: Request, load: Load, objectives: Objectives) -> int:
    from serving.loadtest import report
    from serving.loadtest.measure import Generators
    from serving.loadtest.search import Step, find_max

    def attempt(rate: float, is_proof: bool) -> Measured:
        seconds = load.duration if is_proof else args.step_seconds
        return generators.measure(replace(load, rate=rate, duration=seconds))

    def tell(step: Step) -> None:
        _tell(args, report.step_line(step))

    _tell(args, f"{request.method} {request.target.url}: the highest rate within {args.slo}")
    with Generators(request, args.processes) as generators:
        found = find_max(load.rate, objectives, attempt, tell)
    _tell(args, report.found_line(found))
    if found.best is not None:
        for line in report.lines(found.best.summary):
            _tell(args, line)
        _plot(args, request, objectives, found.best.measured, found.best.summary)
    if args.json:
        steps = [{"rate": step.rate, "broken": step.broken, **step.summary.as_json()} for step in found.steps]
        best = found.best.rate if found.best else None
        print(json.dumps({"url": request.target.url, "max_rps": best, "limit": found.limit, "steps": steps}))
    if found.steps[-1].summary.interrupted:
        return EXIT_INTERRUPTED
    return EXIT_DONE if found.best else EXIT_FAILURE


def _plot(
    args: argparse.Namespace, request: Request, objectives: Objectives, measured: Measured, summary: Summary
) -> None:
    if args.no_plot or not summary.sent:
        return
    from serving.loadtest import report
    from serving.loadtest.plot import draw

    limits = {key: getattr(objectives, f"{key}_ms") for key in ("p50", "p95", "p99")}
    title = report.heading(request, measured.load, args.processes)
    draw(measured, summary, title, {key: value for key, value in limits.items() if value is not None}, args.plot)
    _tell(args, f"plot       {args.plot}")


def _load(args: argparse.Namespace) -> Load:
    from serving.loadtest.measure import Load

    least = {"target_rps": 0.01, "duration": 0.1, "warm_up": 0.0, "timeout": 0.01, "step_seconds": 0.1, "processes": 1}
    for key, low in least.items():
        if not low <= getattr(args, key) < float("inf"):
            raise Mistake(f"--{key.replace('_', '-')}: {getattr(args, key)} won't do, it is at least {low:g}")
    if args.processes > 256:
        raise Mistake("--processes: at most 256 on one machine")
    if args.target_rps * (args.duration + args.warm_up) > MAX_REQUESTS:
        raise Mistake(f"more than {MAX_REQUESTS:,} requests in one measurement: take a shorter --duration")
    if args.seed < 0:
        raise Mistake("--seed: is at least 0")
    return Load(
        args.target_rps, args.duration, args.warm_up, args.arrivals, args.timeout, args.seed
    )  # fmt: skip


def _request(args: argparse.Namespace) -> Request:
    from serving.loadtest import request as requests

    headers = requests.parse_headers(args.header)
    target = requests.parse_url(args.url, has_body=bool(args.body or args.golden))
    payloads: tuple[requests.Payload, ...] = (requests.Payload(None),)
    tolerance = 0.0
    if args.golden:
        payloads, tolerance = requests.from_bundle(args.golden)
    elif args.body:
        payloads = (requests.from_file(args.body),)
    elif target.path == "/":
        target = replace(target, path="/predict")
        payloads = (requests.example(target.origin, headers, args.timeout),)
    request = requests.Request(target, payloads, headers, tolerance)
    requests.try_once(request, args.timeout)
    return request


def _tell(args: argparse.Namespace, line: str) -> None:
    print(line, file=sys.stderr if args.json else sys.stdout, flush=True)

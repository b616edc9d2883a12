"""Examine this environment before a run is started: versions, devices, limits, disk, network, MLflow.

trainer doctor                                              this machine
trainer doctor --config resnet50.yaml data.workers=8        against what a config needs
torchrun --nnodes=2 --nproc-per-node=8 ... -m trainer doctor    every node, and the network between them
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import textwrap
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

from trainer import cli, doctor
from trainer.doctor import Check, Probe, Setting, Status, files, limits, network, versions
from trainer.environment import host
from trainer.errors import EXIT_DONE, EXIT_FAILURE, UserError
from trainer.world import World, from_environment

TIMEOUT = 30.0
"""Seconds for a process that imports torch: 2 from a warm disk, ten times that from a cold network file system."""
PATIENCE = 5.0
"""Seconds that a probe with a deadline of its own may take longer, before it is left alone."""
WIDTH_OF_NAMES = 14
COLOURS: dict[Status, str] = {"ok": "32", "warning": "33", "problem": "1;31"}
"""Of a terminal: green, yellow, bold red (SGR codes)."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    cli.add_config_arguments(parser, required=False)
    parser.add_argument("--runs-dir", metavar="FOLDER", help="folder of all runs (of the config, else runs)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT,
        metavar="SECONDS",
        help=f"how long the look at the devices and the all-reduce may take, each ({TIMEOUT:g})",
    )


def run(args: argparse.Namespace) -> int:
    """Print one line a check; exit code 1 where one is a problem. In a launched world, rank 0 speaks for all."""
    if not args.timeout > 0:
        raise UserError(f"--timeout {args.timeout:g}: wanted more than 0 seconds")
    setting = _setting(args)
    place = setting.world
    talks = place.is_main and not args.json
    report: list[Check] = []

    def add(checks: list[Check]) -> None:
        report.extend(checks)
        for check in checks if talks else ():
            show(check)

    for probe in _of_the_node(setting, args.timeout) if place.local_rank == 0 else ():
        add(doctor.examine(probe, args.debug))
    if place.is_main:
        add(doctor.examine(_mlflow(setting), args.debug))
    exchanged = doctor.examine(_all_reduce(setting, args.timeout, report), args.debug)
    if not place.is_main:
        return _end_aside(place, exchanged)
    add(exchanged)
    status = doctor.worst(check.status for check in report)
    if args.json:
        print(json.dumps({"checks": [asdict(check) for check in report], "status": status}))
    else:
        print(_summary(report))
    return EXIT_FAILURE if status == "problem" else EXIT_DONE


def _setting(args: argparse.Namespace) -> Setting:
    if args.overrides and not args.config:
        raise UserError("overrides change a config: name one by --config FILE")
    config = None
    if args.config:
        from trainer.load import load

        config = load(args.config, args.overrides)
    folder = args.runs_dir or (config.runs_dir if config else "runs")
    return Setting(Path(folder), from_environment(), config)


def _of_the_node(setting: Setting, timeout: float) -> list[Probe]:
    from trainer.doctor.devices import SMI_SECONDS, devices

    disk = f"the file system of {setting.runs_dir.absolute()} hangs: look at mount and dmesg"
    dns = "the name server does not answer: look at /etc/resolv.conf, or use addresses"
    return [
        Probe("python", versions.python),
        Probe("packages", versions.packages, 10),
        Probe("devices", lambda: devices(setting, timeout), timeout + SMI_SECONDS + PATIENCE),
        Probe("cores", lambda: limits.cores(setting)),
        Probe("threads", lambda: limits.threads(setting)),
        Probe("memory", lambda: limits.memory(setting)),
        Probe("shared memory", lambda: limits.shared_memory(setting)),
        Probe("runs folder", lambda: files.room(setting), 10, disk),
        Probe("disk speed", lambda: files.speed(setting), 20, disk),
        Probe("file locks", lambda: files.locks(setting), 10, disk),
        Probe("open files", lambda: limits.open_files(setting)),
        Probe("processes", lambda: limits.processes(setting)),
        Probe("interfaces", lambda: network.interfaces(setting)),
        Probe("names", lambda: network.names(setting), 10, dns),
        Probe("clock", lambda: files.clock(setting), 10, disk),
    ]


def _all_reduce(setting: Setting, timeout: float, report: list[Check]) -> Probe:
    from trainer.doctor.allreduce import NAME, SLOWEST_NODE, all_reduce

    faults = [check for check in report if check.status != "ok"]
    return Probe(NAME, lambda: all_reduce(setting, timeout, faults), timeout + SLOWEST_NODE + PATIENCE)


def _end_aside(place: World, checks: list[Check]) -> int:
    """How a rank ends that has no report of its own."""
    wrong = [check for check in checks if check.status == "problem"]
    for check in wrong if place.local_rank == 0 else ():
        print(f"rank {place.rank} on {host()}: {_line(check)}", file=sys.stderr)
    # A failure beside rank 0 would have the launcher end it before it has spoken; on another node torchrun would wait
    # five minutes for the node of rank 0, which has failed.
    return EXIT_FAILURE if wrong and place.rank >= place.local_size else EXIT_DONE


def _mlflow(setting: Setting) -> Probe:
    from trainer.doctor.mlflow import GOES_ON, NAME, SECONDS, mlflow

    return Probe(NAME, lambda: mlflow(setting), 2 * SECONDS + PATIENCE, f"the server is overloaded, or none; {GOES_ON}")


def show(check: Check) -> None:
    """Print a check as one line, or on a terminal as wide as that, with the remedy below."""
    if not sys.stdout.isatty():
        print(_line(check), flush=True)
        return
    width = max(shutil.get_terminal_size().columns, 60)
    indent = " " * (len("problem") + WIDTH_OF_NAMES + 4)
    first, *more = textwrap.wrap(_line(replace(check, remedy=None)), width, subsequent_indent=indent)
    colour = COLOURS[check.status] if "NO_COLOR" not in os.environ else "0"
    print(f"\033[{colour}m{check.status}\033[0m{first.removeprefix(check.status)}", *more, sep="\n")
    if check.remedy:
        print(textwrap.fill(f"→ {check.remedy}", width, initial_indent=indent, subsequent_indent=f"{indent}  "))
    sys.stdout.flush()


def _line(check: Check) -> str:
    remedy = f" → {check.remedy}" if check.remedy else ""
    return f"{check.status:<7}  {check.name:<{WIDTH_OF_NAMES}}  {check.found}{remedy}"


def _summary(report: list[Check]) -> str:
    count = Counter(check.status for check in report)
    parts = [f"{count[status]} {status}{'s' if count[status] > 1 else ''}" for status in ("problem", "warning")]
    return f"\n{len(report)} checks: {' and '.join(part for part in parts if part[0] != '0') or 'all ok'}"

"""Run a model's versions behind one address, and let a new one take over only as long as it is no worse.

trainer deploy run NAME BUNDLE --port 8000      the front, and the version to begin with; NAME alone goes on as before
trainer deploy start NAME BUNDLE --plan FILE    give it a new version: canary, blue-green, shadow or ab
trainer deploy status NAME                      where it stands, and what is known of the new version
trainer deploy promote NAME                     all traffic to the new version, now
trainer deploy rollback NAME                    back to the version before, now
trainer deploy log NAME                         every decision with its reason
trainer deploy stop NAME                        end the front and its servers; what it knows stays
trainer deploy render BUNDLE --target docker    files for Docker, Compose, Kubernetes, a cloud
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serving.errors import Mistake, ServingError
from serving.rollout import admin
from serving.rollout.state import FRONT_LOG, LOG, SOCKET, StateDirectory, named
from trainer.errors import EXIT_DONE, EXIT_FAILURE, TrainerError, UserError

FOLDER = "deployments"
READY_SECONDS = 900.0
"""For a front in the background: its first version loads a model."""
STOP_SECONDS = 120.0
POLL_SECONDS = 0.2
TEXT_OF_NAME = "of the deployment: its folder in deployments/"


class _Actions(argparse._SubParsersAction):  # type: ignore[type-arg]
    """The actions; `render` brings its own options, which are imported when it is chosen."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        chosen = self.choices.get("render") if values and values[0] == "render" else None
        if chosen is not None:
            importlib.import_module("serving.deploy.command").configure(chosen)
        super().__call__(parser, namespace, values, option_string)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the actions and their options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, action=_Actions)
    _configure_run(_action(actions, "run", "run the front, with the version to begin with"))
    start = _action(actions, "start", "begin to give the traffic to a new version")
    start.add_argument("source", metavar="VERSION", help="a bundle, or the URL of a server that runs")
    start.add_argument(
        "--plan", metavar="FILE", help="YAML: strategy, steps, limits, margins (a canary where not given)"
    )
    start.add_argument("--strategy", choices=("canary", "blue-green", "shadow", "ab"), help="in place of the plan's")
    start.add_argument("--wait", action="store_true", help="until it has ended; exit code 1 where it was rolled back")
    _action(actions, "status", "where it stands")
    _action(actions, "promote", "all traffic to the new version, as soon as it is ready")
    _action(actions, "rollback", "back to the version before, now")
    labels = _action(actions, "labels", "tell the right labels of earlier requests, to compare the versions by them")
    labels.add_argument("file", metavar="FILE", help='JSON Lines of {"request_id": ..., "label": ...}; - is stdin')
    log = _action(actions, "log", "every decision with its reason")
    log.add_argument("--last", type=int, metavar="N", help="only the last N")
    _action(actions, "stop", "end the front and its servers; what it knows stays")
    alias = _action(actions, "alias", "move an alias of the MLflow registry, as the front does", name=False)
    _add_registry(alias)
    alias.add_argument("event", metavar="JSON", help='{"event", "source", "version", "run"}, from the front')
    text = "files for Docker, Compose, Kubernetes, a cloud"
    _common(actions.add_parser("render", help=text, description=text, allow_abbrev=False))


def run(args: argparse.Namespace) -> int:
    """Do the action."""
    if args.action == "render":
        code: int = importlib.import_module("serving.deploy.command").run(args)
        return code
    if args.action == "alias":
        return _alias(args)
    return ACTIONS[args.action](named(args.folder, args.name), args)


def _configure_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="VERSION", nargs="?", help="a bundle, or the URL of a server; not given: go on as before"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (8000)")
    parser.add_argument("--tls-cert", metavar="FILE", default="", help="certificate (PEM); https then")
    parser.add_argument("--tls-key", metavar="FILE", default="", help="its key")
    parser.add_argument("--max-body-mb", type=int, default=16, metavar="N", help="largest body of a request (16)")
    parser.add_argument("--drain-seconds", type=float, default=30.0, metavar="S", help="for requests at the end (30)")
    parser.add_argument("--serve", default="", metavar="OPTIONS", help='of trainer serve, e.g. --serve="--workers 2"')
    parser.add_argument("--background", action="store_true", help="return once it is ready")
    _add_registry(parser)


def _add_registry(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--registered-model", metavar="MODEL", help="of the MLflow registry, whose alias follows")
    parser.add_argument("--alias", help="that follows, e.g. champion")
    parser.add_argument("--tracking-uri", metavar="URI", help="of MLflow (MLFLOW_TRACKING_URI, else runs/mlflow.db)")


def _action(actions: Any, action: str, text: str, name: bool = True) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(action, help=text, description=text, allow_abbrev=False)
    if name:
        parser.add_argument("name", metavar="NAME", help=TEXT_OF_NAME)
        parser.add_argument("--folder", default=FOLDER, help=f"of all deployments ({FOLDER})")
    _common(parser)
    return parser


def _common(parser: argparse.ArgumentParser) -> None:
    # Also accepted behind the action; SUPPRESS keeps what was given before it.
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object")
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )


def _run(directory: StateDirectory, args: argparse.Namespace) -> int:
    line = [sys.executable, "-m", "serving.rollout", str(directory.path)]
    if args.source is not None:
        line.append(json.dumps(_settings(args)))
    elif directory.read() is None:
        raise UserError(f"{directory.path}: nothing runs here yet; name the bundle to begin with")
    if args.background:
        return _in_background(directory, line, args.json)
    sys.stdout.flush()
    os.execv(sys.executable, line)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    source = args.source
    if not source.startswith(("http://", "https://")):
        from serving.bundle import Bundle

        Bundle.read(source)
        source = str(Path(source).absolute())  # a symlink stays one: it may point to another bundle later
    names = ("host", "port", "tls_cert", "tls_key", "max_body_mb", "drain_seconds")
    return {
        "source": source,
        **{name: getattr(args, name) for name in names},
        "options": shlex.split(args.serve),
        "hook": _hook(args),
    }


def _hook(args: argparse.Namespace) -> list[str]:
    """What the front calls after a promotion and after a rollback of one; empty where no alias is to follow."""
    if (args.alias is None) != (args.registered_model is None):
        raise UserError("--alias and --registered-model belong together: give both, or none")
    if args.alias is None:
        return []
    from trainer.registry import alias_uri

    line = [sys.executable, "-m", "trainer", "deploy", "alias", "--alias", args.alias]
    line += ["--registered-model", args.registered_model]
    # An address of the environment stays there: it may hold a password.
    given = args.tracking_uri is not None or "MLFLOW_TRACKING_URI" not in os.environ
    return [*line, "--tracking-uri", alias_uri(args.tracking_uri)] if given else line


def _in_background(directory: StateDirectory, line: Sequence[str], as_json: bool) -> int:
    directory.path.mkdir(parents=True, exist_ok=True)
    log = directory.path / FRONT_LOG
    with log.open("ab") as output:
        start = output.tell()
        process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            said = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
            raise TrainerError(
                f"the front ended: {said[-1] if said else f'exit code {process.returncode}'} (log: {log})"
            )
        try:
            if _status(directory)["versions"]["old"]["ready"]:
                _print(as_json, {"pid": process.pid, "log": str(log)}, f"runs (process {process.pid}), log: {log}")
                return EXIT_DONE
        except ServingError:  # it does not listen yet
            pass
        time.sleep(POLL_SECONDS)
    process.terminate()
    raise TrainerError(f"the front was not ready after {READY_SECONDS:g} s; see {log}")


def _start(directory: StateDirectory, args: argparse.Namespace) -> int:
    from serving.rollout import plan as plans

    plan = plans.load(Path(args.plan) if args.plan else None, args.strategy)
    source = args.source
    if not source.startswith(("http://", "https://")):
        source = str(Path(source).absolute())
    content = {"source": source, "plan": plans.to_state(plan)}
    told = admin.ask(directory.path / SOCKET, "POST", "/start", content)
    _print(args.json and not args.wait, told, f"rollout {told['rollout']} of {source}: {plan.strategy}")
    return _wait(directory, told["rollout"], args.json) if args.wait else EXIT_DONE


def _wait(directory: StateDirectory, name: str, as_json: bool) -> int:
    """Until a rollout has ended. Raises ServingError where the front does not answer."""
    while _status(directory).get("rollout", {}).get("name") == name:
        time.sleep(POLL_SECONDS)
    ends = [line for line in directory.lines(LOG) if line.get("rollout") == name and line["action"] in ENDS]
    if not ends:
        raise TrainerError(f"rollout {name} has left no end in {directory.path / LOG}")
    _print(as_json, ends[-1], f"{ends[-1]['action']}: {ends[-1]['reason']}")
    return EXIT_DONE if ends[-1]["action"] == "promote" else EXIT_FAILURE


def _show(directory: StateDirectory, args: argparse.Namespace) -> int:
    state = directory.read()
    if state is None:
        raise UserError(f"{directory.path}: no deployment; begin one with: trainer deploy run {args.name} BUNDLE")
    try:
        told = {"running": True, **_status(directory)}
    except Mistake:
        rollout = state.get("rollout")
        told = {"running": False, "phase": state["phase"], "source": state["source"]}
        told |= {"rollout": {"step": rollout["step"] + 1, "source": rollout["source"]}} if rollout else {}
    if args.json:
        print(json.dumps(told))
        return EXIT_DONE
    if not told["running"]:
        print(
            f"{args.name}: not running ({told['phase']}, {told['source']}); go on with: trainer deploy run {args.name}"
        )
        return EXIT_DONE
    _tell_status(args.name, told)
    return EXIT_DONE


def _tell_status(name: str, told: dict[str, Any]) -> None:
    print(f"{name}: {told['phase']}")
    for arm, version in told["versions"].items():
        print(f"  {arm:<6} {version['version']}  {version['reason']}  {version['url']}")
    rollout = told.get("rollout")
    if rollout is not None:
        print(
            f"  {rollout['strategy']}, step {rollout['step']} of {rollout['steps']}: {rollout['percent']:g} % for "
            f"{rollout['elapsed_seconds']:.0f} s and {rollout['requests_of_step']} requests of the new version"
        )
        for finding in rollout["findings"]:
            print(f"  {finding['level']:<8} {finding['text']}")
    if "hook_pending" in told:
        print(f"  the registry's alias still has to follow ({told['hook_pending']['event']})")


def _promote(directory: StateDirectory, args: argparse.Namespace) -> int:
    deadline = time.monotonic() + READY_SECONDS
    while "new" in (versions := _status(directory)["versions"]) and not versions["new"]["ready"]:
        if time.monotonic() > deadline:
            raise TrainerError(f"the new version is not ready: {versions['new']['reason']}")
        time.sleep(POLL_SECONDS)
    told = admin.ask(directory.path / SOCKET, "POST", "/promote")
    _print(args.json, told, f"{told['versions']['old']['version']} has all traffic")
    return EXIT_DONE


def _rollback(directory: StateDirectory, args: argparse.Namespace) -> int:
    told = admin.ask(directory.path / SOCKET, "POST", "/rollback")
    _print(args.json, told, f"back to {told['back_to']}")
    return EXIT_DONE


def _labels(directory: StateDirectory, args: argparse.Namespace) -> int:
    try:
        text = sys.stdin.read() if args.file == "-" else Path(args.file).read_text(encoding="utf-8")
        entries = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{args.file}: wanted JSON Lines: {error}") from error
    told = admin.ask(directory.path / SOCKET, "POST", "/labels", entries)
    _print(args.json, told, f"{told['taken']} labels taken, {told['unknown']} of requests that are not known")
    return EXIT_DONE


def _log(directory: StateDirectory, args: argparse.Namespace) -> int:
    lines = directory.lines(LOG, last=args.last)
    if args.json:
        print(json.dumps({"decisions": lines}))
        return EXIT_DONE
    for line in lines:
        print(f"{line['time'][:19]}  {line['action']}: {line['reason']}")
    return EXIT_DONE


def _stop(directory: StateDirectory, args: argparse.Namespace) -> int:
    pid = directory.holder()
    if pid is None:
        raise UserError(f"no front runs for {directory.path}")
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while directory.holder() == pid:
        if time.monotonic() > deadline:
            raise TrainerError(
                f"process {pid} has not ended after {STOP_SECONDS:g} s; see {directory.path / FRONT_LOG}"
            )
        time.sleep(POLL_SECONDS / 4)
    _print(args.json, {"stopped": pid}, f"stopped; go on with: trainer deploy run {args.name}")
    return EXIT_DONE


def _alias(args: argparse.Namespace) -> int:
    if args.alias is None or args.registered_model is None:
        raise UserError("--alias and --registered-model say what is to follow")
    from trainer.registry import alias_uri, point_alias

    try:
        event = json.loads(args.event)
        of_run = dict(event["run"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the event is no JSON object with a field `run`: {error}") from error
    version = point_alias(alias_uri(args.tracking_uri), args.registered_model, args.alias, of_run)
    told = {"model": version.model, "version": version.version, "alias": args.alias}
    _print(getattr(args, "json", False), told, f"models:/{version.model}@{args.alias} is version {version.version}")
    return EXIT_DONE


def _status(directory: StateDirectory) -> dict[str, Any]:
    told: dict[str, Any] = admin.ask(directory.path / SOCKET, "GET", "/status")
    return told


def _print(as_json: bool, told: dict[str, Any], text: str) -> None:
    print(json.dumps(told) if as_json else text, flush=True)


ENDS = ("promote", "rollback")
ACTIONS = {
    "run": _run,
    "start": _start,
    "status": _show,
    "promote": _promote,
    "rollback": _rollback,
    "labels": _labels,
    "log": _log,
    "stop": _stop,
}

"""Write the files that deploy a bundle: an image, Compose, Kubernetes, a cloud's, or a pipeline's."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from serving.deploy.options import Options

TARGETS = (
    "docker",
    "compose",
    "kubernetes",
    "kserve",
    "argo-rollouts",
    "sagemaker",
    "vertex",
    "azureml",
    "ci",
)
CONTEXTS = {"docker": "", "compose": "image", "sagemaker": "image", "vertex": "image", "azureml": "image"}
"""Target -> folder of its output that is an image's build context, and gets the server and the bundle."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options; those that a target has no use for are ignored by it."""
    defaults = Options(image="-")
    parser.add_argument("bundle", metavar="BUNDLE", help="folder made by trainer export")
    parser.add_argument("--target", required=True, choices=TARGETS, help="what to write files for")
    parser.add_argument("--output", metavar="FOLDER", help="where to write (deploy/TARGET)")
    parser.add_argument("--dry-run", action="store_true", help="print the files instead of writing them")
    parser.add_argument("--force", action="store_true", help="write over files that are there")
    parser.add_argument("--image", default="", help="name and tag of the server's image (NAME:VERSION of the bundle)")
    for name, metavar, text in (
        ("port", "N", "port of the server in its container"),
        ("replicas", "N", "fewest servers"),
        ("max-replicas", "N", "most servers"),
        ("cpu", "N", "cores of one server"),
        ("gpus", "N", "GPUs of one server"),
        ("workers", "N", "processes that run the model, of one server"),
        ("max-batch", "N", "largest batch"),
        ("drain-seconds", "N", "seconds to answer what was accepted, at the end"),
        ("base-image", "IMAGE", "first line of the Dockerfile (a slim Python of this version)"),
        ("host", "NAME", "host name that is served, with --expose"),
        ("namespace", "NAME", "where the objects go, for argo-rollouts with --expose gateway"),
        ("gateway", "NAME", "the Gateway, with --expose gateway"),
        ("ingress-class", "NAME", "class of the Ingress"),
        ("ingress-namespace", "NAME", "where the ingress controller or gateway runs"),
        ("monitoring-namespace", "NAME", "where Prometheus runs"),
        ("prometheus", "URL", "where the analysis of a canary asks"),
        ("max-errors", "SHARE", "share of requests that may fail in a month"),
        ("p95-ms", "MS", "largest p95 before somebody is told"),
        ("storage-uri", "URI", "KServe: where the bundle lies; empty: in the image"),
    ):
        default = getattr(defaults, name.replace("-", "_"))
        shown = f" ({default})" if default else ""
        parser.add_argument(f"--{name}", metavar=metavar, type=type(default), default=default, help=f"{text}{shown}")
    parser.add_argument("--memory", metavar="SIZE", default="", help="memory of one server (by the bundle's size)")
    parser.add_argument("--expose", choices=["ingress", "gateway", "none"], default="none", help="to outside (none)")
    parser.add_argument("--api-keys", action="store_true", help="ask for keys, which come from a secret")


def run(args: argparse.Namespace) -> int:
    """Render and write, or print. Raises Mistake for options that don't fit, and for files that are there."""
    from serving.bundle import Bundle
    from serving.deploy import facts, options, writing

    bundle = Bundle.read(args.bundle)
    found = facts.read(bundle, args.gpus)
    image = args.image or f"{found.label}:{found.version}"
    memory = args.memory or found.memory(max(1, args.workers))
    given = {item.name: getattr(args, item.name) for item in fields(Options)}
    chosen = Options(**{**given, "image": image, "memory": memory})
    options.check(chosen)
    files = rendered(args.target, found, chosen)
    output = Path(args.output or f"deploy/{args.target}")
    context = CONTEXTS.get(args.target)
    if args.dry_run:
        _print(files, args.json)
        return 0
    bundle.verify()  # what goes into an image is what was exported
    written = writing.write(files, output, args.force)
    if context is not None:
        writing.add_context(output / context, bundle)
    if args.json:
        print(json.dumps({"target": args.target, "output": str(output), "image": image, "files": sorted(written)}))
    else:
        print(
            f"files in {output}: {len(written)}; each says at its top what to change and how to apply it",
            file=sys.stderr,
        )
        for path in sorted(written):
            print(path)
    return 0


def rendered(target: str, found: object, chosen: Options) -> dict[str, str]:
    """Path -> text of a target; a function of its arguments alone."""
    module = importlib.import_module(f"serving.deploy.targets.{target.replace('-', '_')}")
    files: dict[str, str] = module.render(found, chosen)
    return files


def _print(files: Mapping[str, str], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"files": files}))
        return
    for path, text in sorted(files.items()):
        print(f"==> {path} <==")
        print(text)

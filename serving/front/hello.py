"""What the server says when it is ready."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from typing import Any

from serving.bundle import Bundle
from serving.front.served import Served, in_path, is_language

LONGEST_EXAMPLE = 600
"""Characters of a request that is printed."""


def address(args: argparse.Namespace, port: int) -> str:
    """The server's URL."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(args.host, args.host)
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"{'http' if args.tls_cert is None else 'https'}://{host}:{port}"


def say(args: argparse.Namespace, served: Served, url: str, seconds: float) -> None:
    """One line for each model, one with the address and a first request; one JSON object with `--json`."""
    models = [{"name": model.name, "version": model.bundle.version} for model in served]
    if args.json:
        print(json.dumps({"url": url, "pid": os.getpid(), "models": models}), flush=True)
        return
    for model in served:
        bundle: Bundle = model.bundle
        what = f"{bundle.task}, {bundle.program.runtime} {bundle.program.dtype}, golden requests: {bundle.golden.count}"
        print(f"serving {model.name} {bundle.version} ({what}), workers: {model.state.workers_up}")
    first = next(iter(served))
    print(f"ready at {url} after {seconds:.1f} s; docs at {url}/docs; try: {example(first, url)}", flush=True)


def example(model: Any, url: str) -> str:
    """A first request by curl."""
    if is_language(model.bundle):
        body = {"model": model.name, "messages": [{"role": "user", "content": "What is a ledger?"}]}
        return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
    path = f"{url}/models/{in_path(model.name)}/predict"
    request = golden(model.bundle)
    body_text = json.dumps({"instances": [request]})
    if len(body_text) > LONGEST_EXAMPLE:
        if model.bundle.preprocessing.get("kind") == "picture":
            return f"curl {path} -H 'Content-Type: image/jpeg' --data-binary @picture.jpg"
        body_text = '{"instances": [...]}'
    return f"curl {path} -H 'Content-Type: application/json' -d {shlex.quote(body_text)}"


def golden(bundle: Bundle) -> Any:
    """The first golden request."""
    with bundle.file(bundle.golden.file).open(encoding="utf-8") as lines:
        return json.loads(lines.readline())["request"]

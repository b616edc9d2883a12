"""An image: Dockerfile, pinned requirements; the writer puts the `serving` package and the bundle beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from serving.deploy.facts import Facts
from serving.deploy.options import UID, Options
from serving.deploy.yaml_text import comment
from serving.errors import Mistake

FILES = Path(__file__).parent.parent / "files"
PYTHON = {"3.11": "3.11.13", "3.12": "3.12.11", "3.13": "3.13.5", "3.14": "3.14.0"}
"""Minor version -> the release whose slim image is the base."""


def render(facts: Facts, options: Options) -> dict[str, str]:
    """Dockerfile, .dockerignore and requirements.txt; the context is complete with `serving/` and `bundle/`."""
    entry = ["python", "-m", "serving"]
    command = f"ENTRYPOINT {json.dumps(entry)}\nCMD {json.dumps(options.arguments())}"
    return image(facts, options, command)


def image(facts: Facts, options: Options, command: str, extra: str = "", health: str = "/ready") -> dict[str, str]:
    """The files of a build context.

    Args:
        command: the last lines of the Dockerfile.
        extra: lines that copy something more.
        health: path that the health check asks.
    """
    values = {
        "accelerator": _accelerator(options),
        "base": options.base_image or base(facts),
        "command": command,
        "dtype": facts.dtype,
        "extra": extra,
        "health": health,
        "image": options.image,
        "name": facts.name,
        "port": str(options.port),
        "runtime": facts.runtime,
        "starts_within": str(facts.starts_within),
        "task": facts.task,
        "uid": str(UID),
        "version": facts.version,
    }
    return {
        "Dockerfile": filled((FILES / "Dockerfile").read_text(encoding="utf-8"), values),
        ".dockerignore": (FILES / "dockerignore").read_text(encoding="utf-8"),
        "requirements.txt": requirements(facts),
    }


def requirements(facts: Facts) -> str:
    """The pins, with what they are."""
    about = (
        f"All that serving {facts.name} {facts.version} imports, in the versions that it was rendered with.\n"
        "Hashes: pip-compile --generate-hashes, or: uv pip compile --generate-hashes"
    )
    return comment(about) + "".join(f"{line}\n" for line in facts.requirements)


def filled(text: str, values: dict[str, str]) -> str:
    """`text` with every `@key@` replaced; a key that has no value is a fault of the template."""
    return re.sub(r"@([a-z_]+)@", lambda found: values[found[1]], text)


def base(facts: Facts) -> str:
    """A slim Python of the bundle's version. Raises Mistake where none is known."""
    if facts.python not in PYTHON:
        raise Mistake(f"no base image is known for Python {facts.python}: name one with --base-image")
    return f"python:{PYTHON[facts.python]}-slim-bookworm"


def _accelerator(options: Options) -> str:
    if options.gpus:
        return "# For GPUs: the wheels of torch bring CUDA's libraries; the host needs NVIDIA's container toolkit."
    return (
        "# Torch's wheels of the common index bring CUDA's libraries, several GB that a CPU never uses: let that\n"
        "# pip.conf name the index with the CPU's builds. The pins fit both."
    )

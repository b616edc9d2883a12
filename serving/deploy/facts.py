"""What a rendering takes from a bundle and from this environment, as plain data: a rendering reads nothing else."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import dataclass
from typing import Any

from serving.bundle import Bundle
from serving.deploy import pins
from serving.errors import BadBundle

LANGUAGE = "transformers"
"""The runtime of language models."""
MEASUREMENTS = "measurements.json"
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""What may be written into a Dockerfile or a query without quoting."""
LONGEST_NAME = 40
"""Names get endings (`-canary`, hashes), and 63 characters are allowed."""


@dataclass(frozen=True)
class Facts:
    """Of one bundle."""

    name: str
    """The model's, in paths of requests and in metrics."""
    version: str
    task: str
    runtime: str
    dtype: str
    size: int
    """Bytes of all files."""
    in_flight: int | None
    """Requests in flight that one server bears, as measured at export; None where that was not measured."""
    measured_on: str
    """What was measured, for people; empty where nothing was."""
    python: str
    """`3.11`: what the bundle was made with."""
    requirements: tuple[str, ...]
    """`name==version` of all that serving this bundle needs."""

    @property
    def starts_within(self) -> int:
        """Seconds to load, replay the golden requests and warm up."""
        return 600 if self.runtime == LANGUAGE else 300

    def memory(self, workers: int) -> str:
        """What a server is given: each worker holds the program, and once more while it is loaded or reloaded."""
        gib = 1 + workers * (0.5 + 2 * self.size / 2**30)
        return f"{max(2, math.ceil(gib))}Gi"

    @property
    def label(self) -> str:
        """The name as DNS allows it: lower case, digits and `-`, begins with a letter."""
        text = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        if not text or not text[0].isalpha():
            text = f"model-{text}".rstrip("-")
        return text[:LONGEST_NAME].rstrip("-")


def read(bundle: Bundle, gpus: int = 0) -> Facts:
    """The facts of a bundle. Raises BadBundle where its measurements can't be read, Mistake for a missing package."""
    for field in ("name", "task"):
        if not PLAIN.fullmatch(value := getattr(bundle, field)):
            raise BadBundle(f"{bundle.path}: {field} {value!r} can't stand in files: letters, digits, `.`, `_`, `-`")
    capacity = _capacity(bundle)
    in_flight = capacity.get("hpa_target_in_flight")
    return Facts(
        name=bundle.name,
        version=bundle.version,
        task=bundle.task,
        runtime=bundle.program.runtime,
        dtype=bundle.program.dtype,
        size=sum(int(entry["size"]) for entry in bundle.files.values()),
        in_flight=max(1, int(in_flight)) if in_flight is not None else None,
        measured_on=str(capacity.get("machine", "the exporting machine")) if in_flight is not None else "",
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        requirements=pins.requirements(bundle.program.runtime, bundle.preprocessing, bundle.postprocessing, gpus),
    )


def _capacity(bundle: Bundle) -> dict[str, Any]:
    if MEASUREMENTS not in bundle.files:
        return {}
    try:
        content = json.loads(bundle.file(MEASUREMENTS).read_bytes())
        capacity = content.get("capacity", {})
        if not isinstance(capacity, dict):
            raise ValueError("`capacity` is no object")
    except (OSError, ValueError, AttributeError) as error:
        raise BadBundle(f"{bundle.path}: {MEASUREMENTS} can't be read ({error}); export the run again") from error
    return capacity

"""Golden requests through a version that runs: does it answer over HTTP as its training run did?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.bundle import Bundle
from serving.errors import Mistake
from serving.rollout.answers import deviation, predictions_of
from serving.rollout.plan import Plan
from serving.rollout.versions import Version

if TYPE_CHECKING:
    import aiohttp

SECONDS = 30.0
"""For one request."""
TOLERANCE = 1e-3
"""Where no bundle says one."""


@dataclass(frozen=True)
class Replay:
    """What came of it."""

    ok: bool
    text: str
    count: int = 0
    largest_deviation: float = 0.0


@dataclass(frozen=True)
class Case:
    """A request and the prediction that is right."""

    request: Any
    prediction: Any


async def replay(session: aiohttp.ClientSession, version: Version, plan: Plan) -> Replay:
    """Send every golden request to the version and compare; fine, and said so, where there are none."""
    cases, tolerance = cases_of(version.bundle, plan)
    if not cases:
        return Replay(True, "golden requests: none for this version over HTTP (a bundle's server replays its own)")
    largest = 0.0
    for number, case in enumerate(cases):
        try:
            answered = await _ask(session, version, case)
        except (ValueError, OSError, TimeoutError) as error:
            text = f"golden requests: number {number} got no prediction: {error or type(error).__name__}"
            return Replay(False, text, number)
        largest = max(largest, deviation(case.prediction, answered))
        if largest > tolerance:
            text = f"golden requests: number {number} deviates by {largest:.3g}, the tolerance is {tolerance:g}"
            return Replay(False, text, number + 1, largest)
    text = f"golden requests: {len(cases)} of {len(cases)} as in training, largest deviation {largest:.2g}"
    return Replay(True, text, len(cases), largest)


def cases_of(bundle: Bundle | None, plan: Plan) -> tuple[list[Case], float]:
    """The golden requests with the answers as a client sees them, and the tolerance. Raises Mistake for a bad file."""
    if plan.golden_file:
        return _from_file(Path(plan.golden_file)), bundle.golden.tolerance if bundle is not None else TOLERANCE
    if bundle is None or bundle.program.runtime == "transformers":
        return [], TOLERANCE
    import numpy as np

    from serving import outputs

    told = outputs.load(bundle.postprocessing, bundle.signature)
    names = [field.name for field in bundle.signature.outputs]
    cases = []
    for line in bundle.file(bundle.golden.file).read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        row = tuple(np.array(entry["outputs"][name]) for name in names)
        cases.append(Case(entry["request"], told.render(row)))
    return cases, bundle.golden.tolerance


def _from_file(path: Path) -> list[Case]:
    try:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [Case(entry["request"], entry["prediction"]) for entry in entries]
    except OSError as error:
        raise Mistake(f"golden_file: {path} can't be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Mistake(f'golden_file: {path}: wanted lines of {{"request": ..., "prediction": ...}}: {error}') from error


async def _ask(session: aiohttp.ClientSession, version: Version, case: Case) -> Any:
    import aiohttp

    body = {"instances": [case.request]}
    timeout = aiohttp.ClientTimeout(total=SECONDS)
    try:
        async with session.post(f"{version.url}/predict", json=body, timeout=timeout) as answer:
            content = await answer.read()
    except aiohttp.ClientError as error:
        raise OSError(str(error) or type(error).__name__) from error
    if answer.status != 200:
        raise ValueError(f"status {answer.status}: {content[:200].decode(errors='replace')}")
    found = predictions_of(content)
    if len(found) != 1:
        raise ValueError(f"{len(found)} predictions for one instance")
    return found[0]

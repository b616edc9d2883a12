"""A bundle, opened: samples in, rows of outputs out; and the proof that it answers as it did in training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving import inputs, outputs, runtimes
from serving.bundle import Bundle
from serving.errors import BadBundle, BadInput, ServingError
from serving.inputs import Arrays, Encoded
from serving.outputs import Row

REPLAY_BATCH = 32


@dataclass(frozen=True)
class Replay:
    """The golden requests, answered again."""

    count: int
    deviation: float
    """Largest |answer - expected| / max(1, |expected|)."""
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.count > 0 and self.deviation <= self.tolerance  # NaN is not


class Predictor:
    """Runs a bundle's program on samples."""

    def __init__(self, bundle: Bundle, run: runtimes.Run) -> None:
        self.bundle = bundle
        self.input = inputs.load(bundle.preprocessing, bundle.signature)
        self.output = outputs.load(bundle.postprocessing, bundle.signature)
        self._run = run

    @classmethod
    def open(cls, bundle: Bundle, threads: int = 1, device: str = "cpu") -> Predictor:
        """Load the program. Does not compare hashes: `Bundle.verify` does. Raises ServingError."""
        return cls(bundle, runtimes.load(bundle, threads, device))

    def parse(self, instance: Any, where: str) -> Encoded | Arrays:
        """A sample out of decoded JSON. Raises BadInput."""
        return self.input.parse(instance, where)

    def render(self, row: Row, top: int | None = None) -> dict[str, Any]:
        """One sample's outputs as plain data."""
        return self.output.render(row, top)

    def predict(self, samples: Sequence[Encoded | Arrays]) -> list[Row | BadInput | Exception]:
        """The outputs of each sample, or what is wrong with it: a bad one leaves the others alone.

        An exception that is no BadInput is the program's own, raised for this sample alone, too.
        """
        results: list[Row | BadInput | Exception | None] = [None] * len(samples)
        ready: list[tuple[int, Arrays]] = []
        for position, sample in enumerate(samples):
            try:
                ready.append((position, self.input.prepare(sample)))
            except BadInput as error:
                results[position] = error
            except Exception as error:  # a decoder's own fault, with this sample
                results[position] = error
        for group in _alike(ready, self.bundle.program.max_batch):
            answers = self._answers([arrays for _, arrays in group])
            for (position, _), answer in zip(group, answers, strict=True):
                results[position] = answer
        return [result for result in results if result is not None]

    def run_batch(self, batch: list[NDArray[Any]]) -> list[NDArray[Any]]:
        """The program itself on stacked arrays. Raises ServingError where it does not give what the signature says."""
        found = self._run(batch)
        if len(found) != len(self.bundle.signature.outputs) or any(len(part) != len(batch[0]) for part in found):
            raise ServingError(
                f"{self.bundle.name}: the program gives {len(found)} outputs, not those of its signature"
            )
        return found

    def replay(self) -> Replay:
        """Answer the golden requests and compare. Raises BadBundle where their file is damaged."""
        golden = self.bundle.golden
        requests, expected = read_golden(self.bundle)
        deviation = 0.0
        for start in range(0, len(requests), REPLAY_BATCH):
            part = slice(start, start + REPLAY_BATCH)
            try:
                samples = [
                    self.input.parse(request, f"golden[{start + i}]") for i, request in enumerate(requests[part])
                ]
            except BadInput as error:
                raise BadBundle(f"{self.bundle.path}: {golden.file}: {error}") from error
            for answer, wanted in zip(self.predict(samples), expected[part], strict=True):
                if isinstance(answer, Exception):
                    raise BadBundle(f"{self.bundle.path}: a golden request can't be answered: {answer}") from answer
                deviation = _worse(deviation, _deviation(answer, wanted))
        return Replay(len(requests), deviation, golden.tolerance)

    def _answers(self, samples: list[Arrays]) -> list[Row | BadInput | Exception]:
        try:
            # In the samples' own order of memory: pictures have their channels innermost.
            stacked = self.run_batch([stack(arrays) for arrays in zip(*samples, strict=True)])
        except Exception as error:  # of the program: find out whose sample it is
            if len(samples) == 1:
                return [error]
            return [self._answers([sample])[0] for sample in samples]
        return list(zip(*stacked, strict=True))


def read_golden(bundle: Bundle) -> tuple[list[Any], list[list[NDArray[Any]]]]:
    """(requests, outputs of each in the signature's order). Raises BadBundle."""
    requests: list[Any] = []
    answers: list[list[NDArray[Any]]] = []
    try:
        with bundle.file(bundle.golden.file).open(encoding="utf-8") as lines:
            for line in lines:
                entry = json.loads(line)
                requests.append(entry["request"])
                answers.append([np.array(entry["outputs"][field.name]) for field in bundle.signature.outputs])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadBundle(f"{bundle.path}: {bundle.golden.file} can't be read ({error})") from error
    if len(requests) != bundle.golden.count or not requests:
        raise BadBundle(f"{bundle.path}: {bundle.golden.file} has {len(requests)} requests, not {bundle.golden.count}")
    return requests, answers


def deviation_of(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Largest |found - wanted| / max(1, |wanted|); infinite where shapes differ."""
    if found.shape != wanted.shape:
        return float("inf")
    if not found.size:
        return 0.0
    wanted = wanted.astype(np.float64)
    return float(np.max(np.abs(found.astype(np.float64) - wanted) / np.maximum(1.0, np.abs(wanted))))


def _deviation(row: Row, wanted: Sequence[NDArray[Any]]) -> float:
    worst = 0.0
    for found, expected in zip(row, wanted, strict=True):
        worst = _worse(worst, deviation_of(np.asarray(found), expected))
    return worst


def _worse(a: float, b: float) -> float:
    return a if a != a or a >= b else b  # NaN stays


def _alike(ready: list[tuple[int, Arrays]], most: int | None) -> list[list[tuple[int, Arrays]]]:
    """In groups of the same shapes, each of at most `most`."""
    groups: dict[tuple[Any, ...], list[tuple[int, Arrays]]] = {}
    for position, arrays in ready:
        groups.setdefault(tuple((array.shape, array.dtype) for array in arrays), []).append((position, arrays))
    size = most or max(1, len(ready))
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


def stack(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """[N, ...], laid out in memory as each of them is."""
    first = arrays[0]
    if first.ndim == 3 and not first.flags.c_contiguous and first.transpose(1, 2, 0).flags.c_contiguous:
        return np.stack([array.transpose(1, 2, 0) for array in arrays]).transpose(0, 3, 1, 2)
    return np.stack(arrays)

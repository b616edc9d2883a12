"""How quick programs are here, and what a replica of such a machine can take."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.inputs import Arrays, Sample
from serving.predictor import Predictor, stack

BATCHES = (1, 32)
CAPACITY_BATCHES = (1, 2, 4, 8, 16, 32, 64)
MOST_BATCHED = 32
"""What the server puts into one batch where nothing else is said."""
UTILISATION = 0.7
"""Of what a replica can take, before another is started."""
WARM_UPS, LEAST, MOST = 3, 7, 300
SECONDS = 2.0
"""For all programs together at one batch size; twice for capacity."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one batch: the median, and the quarters around it."""

    median: float
    low: float
    high: float


def latencies(
    runs: Mapping[str, Callable[[list[NDArray[Any]]], Any]], samples: Sequence[Arrays], size: int
) -> dict[str, Latency]:
    """Time each program on a batch of `size`, in turns, so that what else the machine does meets all alike.

    `samples` are prepared ones, which are repeated where there are fewer.
    """
    chosen = [samples[i % len(samples)] for i in range(size)]
    batch = [stack(parts) for parts in zip(*chosen, strict=True)]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(WARM_UPS):
            run(batch)
    end = time.perf_counter() + SECONDS
    rounds = 0
    while rounds < LEAST or (rounds < MOST and time.perf_counter() < end):
        for name, run in runs.items():
            began = time.perf_counter()
            run(batch)
            times[name].append((time.perf_counter() - began) * 1e3)
        rounds += 1
    return {name: Latency(*_rounded(np.percentile(spent, [50, 25, 75]))) for name, spent in times.items()}


def capacity(predictor: Predictor, samples: Sequence[Sample], p95_ms: float, price: float | None) -> dict[str, Any]:
    """What this machine answers with the program alone: requests prepared and run, one batch after another.

    HTTP and queueing come on top (about a tenth for a model of 1 ms). The target of a Kubernetes HPA is Little's law:
    requests in flight = rate × time in the server. A request waits for the batch before it and then for its own, so a
    batch size is good for `p95_ms` where twice its p95 is within it; the quickest of those gives the rate.
    """
    rows = [_at(predictor, samples, size) for size in CAPACITY_BATCHES]
    good = [row for row in rows if row["batch"] <= MOST_BATCHED and 2 * row["p95_ms"] <= p95_ms]
    best = max(good, key=lambda row: row["requests_per_second"], default=rows[0])
    rate = best["requests_per_second"]
    in_flight = rate * p95_ms / 1e3
    found = {
        "machine": machine(),
        "batches": rows,
        "p95_bound_ms": p95_ms,
        "is_within_bound": bool(good),
        "batch": best["batch"],
        "requests_per_second": rate,
        "in_flight_at_bound": round(in_flight, 1),
        "hpa_target_in_flight": max(1, int(UTILISATION * in_flight)),
        "utilisation": UTILISATION,
        "how": "Little's law: in flight = requests/s × the p95 bound; the target leaves 30 % of it to spare",
    }
    if price is not None:
        full = price / 3600 / rate * 1000
        found |= {
            "price_usd_per_hour": price,
            "usd_per_thousand": float(f"{full:.4g}"),
            "usd_per_thousand_at_target": float(f"{full / UTILISATION:.4g}"),
        }
    return found


def machine() -> str:
    """What it was measured on, in a line."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass  # not Linux: the architecture must do
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return f"{cpus()} CPUs ({model}), {platform.system()} {platform.machine()}, load {busy:.1f} when measured"


def cpus() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _at(predictor: Predictor, samples: Sequence[Sample], size: int) -> dict[str, Any]:
    batch = [samples[i % len(samples)] for i in range(size)]
    for _ in range(WARM_UPS):
        predictor.predict(batch)
    spent: list[float] = []
    end = time.perf_counter() + SECONDS / 2
    while len(spent) < LEAST or (len(spent) < MOST and time.perf_counter() < end):
        began = time.perf_counter()
        predictor.predict(batch)
        spent.append(time.perf_counter() - began)
    median, p95 = np.percentile(spent, [50, 95]).tolist()
    return {
        "batch": size,
        "requests_per_second": round(size * len(spent) / sum(spent), 1),
        "median_ms": round(median * 1e3, 3),
        "p95_ms": round(p95 * 1e3, 3),
    }


def _rounded(values: NDArray[np.float64]) -> list[float]:
    return [round(float(value), 4) for value in values]

"""Does what was written answer as the run does, and how quick is it here?"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from serving.bundle import Bundle
from trainer.export.measure import machine

ROWS = (1, 8, 32)
PROMPT, STEPS = 64, 6
"""Tokens of each prompt, and tokens that are made for each row."""
SLOWEST_SECONDS = 0.2
"""Between two tokens, for a reader who follows."""


def proved(bundle: Bundle) -> tuple[Any, float]:
    """(the engine's program, the deviation of the golden prompts) of a bundle, opened as its server does.

    Raises ServingError where it does not answer as the run did.
    """
    from serving.language.messages import Load
    from serving.language.worker import open_bundle

    load = Load(
        path=str(bundle.path),
        version=bundle.version,
        threads=torch.get_num_threads(),
        device="auto",
        max_rows=max(ROWS),
        cells=None,
        chunk=256,
    )
    program, _, ready = open_bundle(load)
    return program, ready.deviation


def measure(program: Any, deviation: float, price: float | None) -> dict[str, Any]:
    """Tokens per second by rows, and what follows for a replica of a machine like this one."""
    rows = [_at(program, count) for count in ROWS]
    quick = [row for row in rows if row["seconds_between_tokens"] <= SLOWEST_SECONDS]
    best = max(quick or rows[:1], key=lambda row: row["tokens_per_second"])
    capacity: dict[str, Any] = {
        "machine": machine(),
        "rows": rows,
        "between_tokens_bound_seconds": SLOWEST_SECONDS,
        "is_within_bound": bool(quick),
        "tokens_per_second": best["tokens_per_second"],
        "hpa_target_in_flight": best["rows"],
        "how": "the most answers at once that still get their tokens within the bound; HTTP and waiting come on top",
    }
    if price is not None:
        capacity |= {
            "price_usd_per_hour": price,
            "usd_per_million_tokens": float(f"{price / 3600 / best['tokens_per_second'] * 1e6:.4g}"),
        }
    formats = [{"format": "transformers", "largest_deviation": deviation, "is_chosen": True}]
    return {"formats": formats, "capacity": capacity}


def _at(program: Any, count: int) -> dict[str, Any]:
    from serving.language.batch import Batch, Sequence
    from serving.language.choosing import Chooser
    from serving.language.sampling import Sampling

    length = max(1, min(PROMPT, program.context - STEPS - 2))
    batch = Batch(program, max_rows=count, cells=1 << 40, chunk=count * length)
    sampling = Sampling(max_tokens=STEPS + 2, temperature=0, ignore_eos=True)
    for number in range(count):
        tokens = [(7 * number + position) % program.vocabulary for position in range(length)]
        batch.add(Sequence(number, tokens, Chooser(sampling)))
    spent = []
    while not batch.is_idle:  # the first step reads all prompts
        start = time.perf_counter()
        batch.step()
        spent.append(time.perf_counter() - start)
    first = spent.pop(0) / count
    between = statistics.median(spent)
    return {
        "rows": count,
        "seconds_between_tokens": round(between, 5),
        "tokens_per_second": round(count / between, 2),
        "seconds_to_read_a_prompt": round(first, 5),
        "prompt_tokens": length,
    }

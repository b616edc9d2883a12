"""Peak memory of full fine-tuning, LoRA and QLoRA of the same model on the same batches.

    python benchmarks/lora_memory.py [--quick] [--json FILE]

`trainer fit` from pretrained weights and `trainer finetune-lora` with `lora` and `qlora` (nf4, double quantisation),
SmolLM2-135M-Instruct, fp32, AdamW, three packed sequences of at most 600 tokens a step, r = 8 on all linear layers.
Each is a new process in each round; its peak is the kernel's high-water mark from start to end. The bare model, for
comparison, is what is resident when plain transformers has loaded it: Python, torch and 538 MB of weights. QLoRA's
kernels are slow on a CPU, so it trains two steps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from harness import Row, finish, parse_arguments
from lora_speed import CASES
from workloads import child, lora, lora_ours
from workloads.lora import Work
from workloads.lora_ours import Method

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "lightning")
NAMES: dict[Method, str] = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}
STEPS: dict[Method, int] = {"full": 3, "lora": 3, "qlora": 2}
"""The optimizer's state is there after the first."""


def main() -> None:
    arguments = parse_arguments(__doc__)
    work = replace(lora.prepare(96, 48), **CASES["all-linear"])
    if arguments.quick:
        work = replace(work, max_length=200, packs_per_step=1)
    rounds = 1 if arguments.quick else 3
    peaks: dict[Method, list[float]] = {method: [] for method in get_args(Method)}
    with tempfile.TemporaryDirectory() as name:
        for number in range(rounds):
            for method in peaks:
                peaks[method].append(peak(work, method, Path(name, f"{number}-{method}")) / 1e6)
    finish("Memory of fine-tuning", rows_of(work, peaks, rounds), arguments.json, PACKAGES)


def peak(work: Work, method: Method, folder: Path) -> int:
    """Bytes."""
    folder.mkdir()
    command = lora_ours.command(replace(work, max_steps=STEPS[method]), folder, method)
    return child.run(command, lora.environment(), folder / "log", lora.PATIENCE)


def rows_of(work: Work, peaks: Mapping[Method, Sequence[float]], rounds: int) -> list[Row]:
    """Each method against those that need more, and the bare model."""
    bare = [lora.plain(work, "memory") / 1e6] * rounds
    tokens = {"tokens per step, at most": work.max_length * work.packs_per_step, "steps": STEPS}
    rows = []
    for method in ("qlora", "lora", "full"):
        others = {NAMES[other]: peaks[other] for other in get_args(Method) if other != method}
        rows.append(
            Row(f"{NAMES[method]}: peak", "MB", peaks[method], {**others, "bare model": bare}, "lower", notes=tokens)
        )
    return rows


if __name__ == "__main__":
    main()

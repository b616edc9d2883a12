"""Fine-tuning with LoRA: tokens of training text per second and peak memory, ours, transformers' Trainer and TRL's.

    python benchmarks/lora_speed.py [--quick] [--json FILE] [--case NAME]

`trainer finetune-lora`, transformers' Trainer with PEFT as their documentation sets them up (rows in random order,
padded to the longest of their batch), and TRL's SFTTrainer at its best (packing by best fit, padding-free, without
recomputing activations; its own loss in chunks) train SmolLM2-135M-Instruct on the same 96 conversations of GSM8K for
an epoch, with the loss on the answers: LoRA with r = 8 and alpha = 16 on `q_proj` and `v_proj` (PEFT's choice for this
architecture), AdamW at a constant rate of 1e-3, gradients clipped at 1, fp32. A step is 8 rows of 221 tokens on
average, or three packed sequences of at most 600: 1,770 and 1,800 tokens. `--case all-linear` adapts all linear layers,
`--case bf16` computes in bf16 by autocast.

Each contender is a new process in each round, in a new order, with all cores. The first two steps are not timed, nor
is the start. Tokens are those of the text, prompts too; padding is not counted. Peak memory is the kernel's high-water
mark of the process from its start to its end; the bare model's is what is resident when plain transformers has loaded
it. The held-out loss is that of each contender's saved adapter in plain transformers and PEFT, by one script, on the
same 48 conversations. `--quick` trains two small steps, times one and leaves the loss out.

TRL comes into an environment of its own under `.bench/`, on top of the same torch, transformers and PEFT.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import Goal, Row, argument_parser, finish
from workloads import child, lora, lora_ours, peer_environment
from workloads.lora import Work

TRL_VERSION = "1.16.0"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "lightning")
OURS, TRAINER, TRL = "ours", "Trainer + PEFT", "TRL, packing"
PEERS = {TRAINER: "trainer-peft", TRL: "trl-packed"}
SPEED_GOALS = {TRAINER: 1.5, TRL: 1.15}
SAME_LOSS = 1.02
"""Ratio of held-out losses: after an epoch of few steps, they differ by about a percent with the order of the data."""
CASES: dict[str, dict[str, Any]] = {
    "q and v": {},
    "all-linear": {
        "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    },
    "bf16": {"precision": "bf16-mixed"},
}


@dataclass(frozen=True)
class Turn:
    """One training of one contender."""

    timed: lora_ours.Timed
    peak: int
    """Bytes."""
    adapter: Path


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--case", action="append", choices=list(CASES), help="default: q and v; may be given again")
    arguments = parser.parse_args()
    python = peer_environment.interpreter("trl", [f"trl=={TRL_VERSION}"])
    rows = []
    for case in arguments.case or ["q and v"]:
        work = replace(lora.prepare(96, 48), **CASES[case])
        if arguments.quick:
            work = replace(work, rows_per_step=2, packs_per_step=1, warmup_steps=1, max_steps=2)
        with tempfile.TemporaryDirectory() as name:
            turns = measure(work, python, 1 if arguments.quick else 3, Path(name))
            losses = None if arguments.quick else held_out(work, turns)
        rows += rows_of(case, work, turns, losses)
    finish("LoRA fine-tuning", rows, arguments.json, PACKAGES, {"trl": TRL_VERSION})


def measure(work: Work, python: Path, rounds: int, folder: Path) -> dict[str, list[Turn]]:
    """The turns of each contender, by round."""
    tokens_of_epoch = lora.plain(work, "tokens")
    turns: dict[str, list[Turn]] = {name: [] for name in (OURS, *PEERS)}
    for number in range(rounds):
        for name in random.sample(list(turns), len(turns)):
            place = folder / f"{number} {name}"
            place.mkdir()
            if name == OURS:
                turn = our_turn(work, place, tokens_of_epoch)
            else:
                turn = peer_turn(work, python, PEERS[name], place)
            turns[name].append(turn)
            print(f"round {number + 1}, {name}: {turn.timed.speed:.0f} tokens/s", file=sys.stderr)
    return turns


def our_turn(work: Work, folder: Path, tokens_of_epoch: int) -> Turn:
    peak = child.run(lora_ours.command(work, folder), lora.environment(), folder / "log", lora.PATIENCE)
    return Turn(lora_ours.timed(folder, work, tokens_of_epoch), peak, lora_ours.adapter(folder))


def peer_turn(work: Work, python: Path, peer: str, folder: Path) -> Turn:
    command = [python, "-m", "workloads.lora_peers", peer, work.as_json(), folder]
    peak = child.run(command, lora.environment(), folder / "log", lora.PATIENCE)
    result = json.loads((folder / "result.json").read_bytes())
    timed = lora_ours.Timed(result["timed_steps"], result["tokens"], result["seconds"])
    return Turn(timed, peak, folder / "adapter")


def held_out(work: Work, turns: Mapping[str, Sequence[Turn]]) -> dict[str, list[float]]:
    """Held-out loss by contender and round, and that of the base model, nats per token."""
    adapters = [(name, turn.adapter) for name, own in turns.items() for turn in own]
    base, *losses = lora.plain(work, "loss", *(adapter for _, adapter in adapters))
    found: dict[str, list[float]] = {name: [] for name in turns}
    for (name, _), value in zip(adapters, losses, strict=True):
        found[name].append(value)
    return {**found, "the base model": [base] * len(found[OURS])}


def rows_of(
    case: str, work: Work, turns: Mapping[str, Sequence[Turn]], losses: Mapping[str, Sequence[float]] | None
) -> list[Row]:
    """One row per figure and peer that has a goal, the others beside the last."""
    speed = {name: [turn.timed.speed for turn in own] for name, own in turns.items()}
    memory = {name: [turn.peak / 1e6 for turn in own] for name, own in turns.items()}
    notes = {
        "settings": json.loads(work.as_json()) | {"folder": Path(work.folder).name, "train": "", "held_out": ""},
        "threads": int(lora.environment()["OMP_NUM_THREADS"]),
        "steps timed": {name: own[-1].timed.steps for name, own in turns.items()},
        "tokens per step": {name: own[-1].timed.tokens / own[-1].timed.steps for name, own in turns.items()},
        "bare model, MB": lora.plain(work, "memory") / 1e6,
    }
    rows = [
        *_against(f"{case}: text", "tokens/s", speed, "higher", SPEED_GOALS, notes),
        *_against(f"{case}: peak", "MB", memory, "lower", dict.fromkeys(SPEED_GOALS, 1.0), notes),
    ]
    if losses is not None:
        rows += _against(
            f"{case}: held-out loss", "nats", losses, "lower", dict.fromkeys(SPEED_GOALS, SAME_LOSS), notes
        )
    return rows


def _against(
    case: str, unit: str, samples: Mapping[str, Sequence[float]], better: Any, goals: Mapping[str, float], notes: Any
) -> list[Row]:
    others = {name: own for name, own in samples.items() if name != OURS and name not in goals}
    last = list(goals)[-1]
    return [
        Row(
            case,
            unit,
            samples[OURS],
            {name: samples[name], **(others if name == last else {})},
            better,
            Goal(name, ratio),
            notes,
        )
        for name, ratio in goals.items()
    ]


if __name__ == "__main__":
    main()

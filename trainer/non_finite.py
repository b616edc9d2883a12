"""A loss or gradient that is NaN or infinite: written down with its samples, then stop, skip the step, or go back.

All ranks see it alike, since sums over ranks and norms of exchanged gradients carry it to each of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import TrainerError
from trainer.files import append_line, complete_lines
from trainer.sampling import MicroBatch

if TYPE_CHECKING:
    import torch

    from trainer.engine import Engine
    from trainer.state import Progress
    from trainer.task import Batch

FILE = "non_finite.jsonl"
MAX_SKIPPED = 10
"""Steps in a row that may be skipped: after as many the weights themselves are beyond help."""
MAX_ROLLBACKS = 5
"""Returns to one and the same checkpoint: each leaves out one more step."""


class RollBack(Exception):
    """Go back to the last checkpoint; the step that was at fault is left out from now on."""


@dataclass
class Seen:
    """What one rank computed in one step: micro-batches and losses, kept until the step is known to be good."""

    micros: list[MicroBatch] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    """Samples that could not be read."""

    tokens: int = 0
    """Of text, padding not counted; 0 where the data are none."""

    def add(self, micro: MicroBatch, loss: torch.Tensor, batch: Batch) -> None:
        self.micros.append(micro)
        self.losses.append(loss.detach())
        self.bad += batch["bad"]
        self.tokens += 0 if micro.filler else batch.get("num_tokens", 0)

    def samples(self, rank: int) -> list[dict[str, Any]]:
        """Indices and loss (a sum) of each micro-batch."""
        return [
            {"rank": rank, "indices": list(micro.indices), "loss": float(loss)}
            for micro, loss in zip(self.micros, self.losses, strict=True)
            if not micro.filler
        ]


class Guard:
    """Carries out `train.non_finite`; one on each rank, called alike."""

    def __init__(self, folder: Path, policy: str, engine: Engine) -> None:
        self._file, self._policy, self._engine = folder / FILE, policy, engine
        self._in_a_row = 0
        self._known = engine.on_main(lambda: complete_lines(self._file))
        self.left_out = {entry["consumed"] for entry in self._known if entry["policy"] == "rollback"}
        """Where the steps begin, in samples consumed, that are left out since a rollback."""
        self.checkpoint_step = 0
        """Step of the checkpoint that a rollback would go to."""

    def passed(self) -> None:
        """A step was good."""
        self._in_a_row = 0

    def found(self, progress: Progress, loss: float, norm: float, seen: Seen) -> None:
        """A step was not good: returns when its update is to be skipped, raises RollBack or a TrainerError."""
        every = [part for parts in self._engine.gather(seen.samples(self._engine.world.rank)) for part in parts]
        samples = [part for part in every if not math.isfinite(part["loss"])] or every
        entry = {
            "step": progress.step + 1,
            "consumed": progress.consumed,
            "epoch": seen.micros[0].epoch,
            "policy": self._policy,
            "loss": _json(loss),
            "grad_norm": _json(norm),
            "from": self.checkpoint_step,
            "samples": [{**part, "loss": _json(part["loss"])} for part in samples],
        }
        # On the disk before anything follows: a rollback that is interrupted must leave the same step out
        self._engine.on_main(lambda: append_line(self._file, entry))
        self._known.append(entry)
        what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {norm}"
        samples_text = f"samples {_some(samples)} of epoch {entry['epoch']}; all in {self._file}"
        where = f"{what} at step {progress.step + 1} ({samples_text})"
        if self._policy == "stop":
            raise TrainerError(
                f"{where}: lower optimizer.lr, set train.clip_norm, or set train.non_finite to skip or rollback"
            )
        if self._policy == "skip":
            self._in_a_row += 1
            if self._in_a_row > MAX_SKIPPED:
                raise TrainerError(
                    f"{where}, after {MAX_SKIPPED} skipped steps in a row: go back to an earlier checkpoint"
                )
            return
        rollbacks = sum(one["policy"] == "rollback" and one["from"] == self.checkpoint_step for one in self._known)
        if rollbacks > MAX_ROLLBACKS:
            raise TrainerError(
                f"{where}, after {MAX_ROLLBACKS} returns to the checkpoint of step {self.checkpoint_step}: "
                "lower optimizer.lr or set train.clip_norm"
            )
        self.left_out.add(progress.consumed)
        raise RollBack(where)


def _some(samples: Sequence[dict[str, Any]], most: int = 8) -> str:
    indices = [index for part in samples for index in part["indices"]]
    return ", ".join(map(str, indices[:most])) + (f" and {len(indices) - most} more" if len(indices) > most else "")


def _json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)

"""Two runs compared bit by bit: every checkpoint that both have kept, and every entry of their metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from trainer import checkpoint, saving
from trainer.run import Run

TIMES = ("time", "samples_per_second", "data_wait", "memory_gb", "slowest_rank", "slowest_rank_ratio")
"""Keys of `metrics.jsonl` that no two runs share."""
STATES = {
    "model": "weights",
    "optimizer": "optimizer",
    "ema": "averaged weights",
    "random": "random states",
}
"""Group of tensors in a checkpoint -> what a user calls it."""
NUMBERS = "numbers"
SHOWN_TENSORS = 3


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that is not the same in both."""

    name: str
    largest: float
    """Largest absolute difference of an element; infinite where shape or type differ, or one is no number."""


@dataclass(frozen=True)
class GroupDifference:
    """One kind of state that is not the same in both."""

    state: str
    differing: int
    total: int
    tensors: list[TensorDifference]
    """The first of them by name."""


@dataclass(frozen=True)
class StateDifference:
    """The first checkpoint that is not the same in both."""

    step: int
    groups: list[GroupDifference]
    numbers: list[str]
    """Dotted names in `state.json`: progress, loss scale, numbers of the optimizer."""


@dataclass(frozen=True)
class EntryDifference:
    """The first entry of `metrics.jsonl` that is not the same in both."""

    step: int
    key: str
    undisturbed: Any
    other: Any


@dataclass(frozen=True)
class Comparison:
    """What two runs have in common, and where they begin to differ."""

    checkpoints: int
    """How many were compared."""
    entries: int
    states: list[str]
    """Kinds of state that there were."""
    state: StateDifference | None
    entry: EntryDifference | None

    @property
    def identical(self) -> bool:
        return self.state is None and self.entry is None

    @property
    def step(self) -> int:
        """The first step after which something differs."""
        return min(found.step for found in (self.state, self.entry) if found is not None)


def compare_runs(undisturbed: Run, other: Run) -> Comparison:
    """Compare all that both runs have kept; raises DamagedCheckpoint where one of the checkpoints is not whole."""
    saved = [
        {checkpoint.step_of(path): path for path in checkpoint.present(run.checkpoints)} for run in (undisturbed, other)
    ]
    steps = sorted(saved[0].keys() & saved[1].keys())
    states: list[str] = []
    state: StateDifference | None = None
    for step in steps:
        pair = []
        for paths in saved:
            found = checkpoint.read(paths[step])
            checkpoint.verify(found)
            pair.append(saving.load(found.path, found.manifest))
        states = states or [shown for name, shown in STATES.items() if getattr(pair[0], name)]
        state = _compare_states(step, pair[0], pair[1])
        if state is not None:
            break
    logged = [[_timeless(entry) for entry in run.read_metrics()] for run in (undisturbed, other)]
    entry = _compare_entries(*logged)
    return Comparison(len(steps), len(logged[0]), [*states, NUMBERS], state, entry)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors on the CPU have the same type, shape and bytes; two NaN of the same bits are the same."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    as_bytes = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*as_bytes)


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference of an element; infinite where shapes differ, or where one alone is no number."""
    if one.shape != other.shape:
        return math.inf
    if not one.numel():
        return 0.0
    left, right = one.to(torch.float64), other.to(torch.float64)
    same = (left == right) | (left.isnan() & right.isnan())
    difference = torch.where(same, 0.0, (left - right).abs())
    return math.inf if difference.isnan().any() else float(difference.max())


def _compare_states(step: int, one: Any, other: Any) -> StateDifference | None:
    groups = []
    for group, shown in STATES.items():
        left, right = getattr(one, group), getattr(other, group)
        names = sorted(left.keys() | right.keys())
        differing = [
            name for name in names if not (name in left and name in right and same_bits(left[name], right[name]))
        ]
        if differing:
            tensors = [_tensor_difference(name, left, right) for name in differing[:SHOWN_TENSORS]]
            groups.append(GroupDifference(shown, len(differing), len(names), tensors))
    numbers = sorted(_differing(one.numbers, other.numbers, ""))
    return StateDifference(step, groups, numbers) if groups or numbers else None


def _tensor_difference(name: str, left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> TensorDifference:
    if name not in left or name not in right:
        return TensorDifference(name, math.inf)
    return TensorDifference(name, largest_difference(left[name], right[name]))


def _compare_entries(undisturbed: list[dict[str, Any]], other: list[dict[str, Any]]) -> EntryDifference | None:
    nothing: dict[str, Any] = {}
    for one, two in zip_longest(undisturbed, other, fillvalue=nothing):
        for key in {**one, **two}:
            if not _same_value(one.get(key), two.get(key)):
                return EntryDifference(int(one.get("step", two.get("step", 0))), key, one.get(key), two.get(key))
    return None


def _differing(one: Any, other: Any, name: str) -> Iterable[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from _differing(one.get(key), other.get(key), f"{name}.{key}" if name else key)
    elif not _same_value(one, other):
        yield name


def _same_value(one: Any, other: Any) -> bool:
    both_nan = isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other)
    return both_nan or bool(one == other)


def _timeless(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in TIMES}

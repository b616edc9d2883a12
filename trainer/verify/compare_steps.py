"""Where the differences between two trainings begin: what `recording` heard of one step in each, side by side.

A step is walked through in its order: weights, random states, batch, the model's input, the output of each module,
the loss; then backwards through the gradients; then the weights after the step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer import checkpoint, saving
from trainer.errors import TrainerError
from trainer.progress import print_line
from trainer.run import Run
from trainer.verify.compare_runs import largest_difference

SMALL = 1e-2
"""Tensors whose gradients are all smaller than this share of the model's largest are compared with that share: those
of a bias before a normalisation are zero but for rounding."""


@dataclass(frozen=True)
class Place:
    """Where a difference begins."""

    stage: str
    """`loss scale`, `weights before`, `random state`, `samples`, `batch`, `input`, `module`, `loss`, `gradient` or
    `weights after`."""
    name: str
    """Of the tensor, module or parameter."""
    kind: str
    """Class of the module, or of the parameter's module; empty for what belongs to none."""
    difference: float
    """The largest, relative."""
    sample: int | None = None
    """Index of the sample that differs most, for what is compared by samples."""


@dataclass(frozen=True)
class Heard:
    """One step of one training, of all its ranks together."""

    step: int
    samples: Tensor
    """Indices, ascending."""
    tables: dict[str, Tensor]
    """By `batch/...`, `input/...`, `module/...`: [samples, 2], see `recording.summary`."""
    calls: list[str]
    """Modules' keys in the order in which their outputs were there."""
    kinds: dict[str, str]
    """Class of each module by its name."""
    losses: list[tuple[float, float]]
    """(sum, count) of each micro-batch of each rank."""
    random: dict[str, str]
    silenced: dict[str, int]
    before: dict[str, Tensor]
    gradients: list[dict[str, Tensor]]
    """Of this step, and across worlds of those that followed."""
    after: dict[str, Tensor]
    """Weights and buffers after the last step, which need not be the one that was heard."""


def read(folder: Path, world_size: int, run: Run) -> Heard:
    """What the ranks of a probe have written, and the weights with which its run ended."""
    heard = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world_size)]
    tables = [load_file(folder / f"rank-{rank}.safetensors") for rank in range(world_size)]
    indices = torch.cat([table["indices"] for table in tables])
    order = indices.argsort()
    with_samples = [table for table in tables if len(table["indices"])]
    everywhere = set.intersection(*(set(table) for table in with_samples)) if with_samples else set()
    return Heard(
        step=heard[0]["step"],
        samples=indices[order],
        tables={name: torch.cat([t[name] for t in with_samples])[order] for name in everywhere - {"indices"}},
        calls=heard[0]["calls"],
        kinds=heard[0]["kinds"],
        losses=[(loss, count) for rank in heard for loss, count in rank["losses"]],
        random={f"rank{rank}/{kind}": value for rank, h in enumerate(heard) for kind, value in h["random"].items()},
        silenced=heard[0]["silenced"],
        before=load_file(folder / "before.safetensors"),
        gradients=_gradient_files(folder, heard[0]["step"]),
        after=_last_weights(run),
    )


def first_place(one: Heard, other: Heard, tolerance: float, of_weights: float | None = None) -> Place | None:
    """Where `other` begins to differ from `one` by more than `tolerance` (relative; 0 for bit by bit).

    `of_weights` is the tolerance for weights after a step, where it is another one.
    """
    for place in _places(one, other, tolerance):
        limit = of_weights if place.stage == "weights after" and of_weights is not None else tolerance
        if place.difference > limit:
            return place
    return None


def gradient_differences(one: Heard, other: Heard) -> dict[str, float]:
    """Largest difference of each parameter's gradient, relative to its largest absolute value; see `SMALL`."""
    ours, theirs = one.gradients[0], other.gradients[0]
    floor = SMALL * max((_largest(gradient) for gradient in ours.values()), default=0.0)
    return _relative(ours, theirs, floor)


def weight_differences(one: Heard, other: Heard, tolerance: float) -> dict[str, float]:
    """Largest difference of each weight after the last step, relative to its largest absolute value.

    Where gradients agree, elements are left out whose own gradient differs by more than half of `tolerance` in one of
    the steps: optimizers that divide by its size, as Adam does, make a whole step of what is only rounding.
    """
    gradients = gradient_differences(one, other)
    names = [name for name in one.after if name in other.after and (name in gradients or tolerance == 0)]
    found = {}
    for name in names:
        left, right = one.after[name], other.after[name]
        scale = _largest(left)
        if tolerance and gradients[name] <= tolerance and left.shape == right.shape:
            judged = _judged(name, left.shape, one, other, tolerance)
            left, right = left[judged], right[judged]
        found[name] = _ratio(largest_difference(left, right), scale)
    return found


def _judged(name: str, shape: torch.Size, one: Heard, other: Heard, tolerance: float) -> Tensor:
    judged = torch.ones(shape, dtype=torch.bool)
    for ours, theirs in zip(one.gradients, other.gradients, strict=False):
        if name in ours and name in theirs:
            left, right = ours[name].to(torch.float64), theirs[name].to(torch.float64)
            judged &= (left - right).abs() <= left.abs() * (tolerance / 2)
    return judged


def _gradient_files(folder: Path, first: int) -> list[dict[str, Tensor]]:
    files = (folder / f"gradients-{step}.safetensors" for step in count(first))
    return [load_file(file) for file in takewhile(Path.exists, files)]


def _last_weights(run: Run) -> dict[str, Tensor]:
    found = checkpoint.newest_whole(run.checkpoints, print_line)
    if found is None:
        raise TrainerError(f"{run.path} has no whole checkpoint")
    return saving.load(found.path, found.manifest).model


def _places(one: Heard, other: Heard, tolerance: float) -> Iterator[Place]:
    exactly = tolerance == 0
    if one.step != other.step:
        yield Place("loss scale", f"with step {one.step} as the first to be taken, here {other.step}", "", math.inf)
        return
    for name, difference in _relative(one.before, other.before, 0.0).items():
        yield Place("weights before", name, _kind(one, name), difference)
    for name in sorted(one.random) if exactly else ():
        yield Place("random state", name, "", 0.0 if one.random[name] == other.random.get(name) else math.inf)
    if not torch.equal(one.samples, other.samples):
        yield Place("samples", "", "", math.inf)
        return
    for key in _in_order(one) if len(one.samples) else ():
        if key in other.tables:
            yield _of_samples(key, one, other)
    yield _loss(one, other)
    yield from _gradients(one, other)
    weights = weight_differences(one, other, tolerance)
    for name, difference in sorted(weights.items(), key=lambda item: -item[1]):
        yield Place("weights after", name, _kind(one, name), difference)


def _in_order(heard: Heard) -> list[str]:
    """Keys of the tables: batch, input, then modules as their outputs were there."""
    called = {key: place for place, key in enumerate(heard.calls)}
    return sorted(heard.tables, key=lambda key: (key.startswith("module/"), called.get(key.partition("[")[0], 0), key))


def _of_samples(key: str, one: Heard, other: Heard) -> Place:
    left, right = one.tables[key], other.tables[key]
    stage, _, name = key.partition("/")
    by_sample = (left[:, 0] - right[:, 0]).abs()
    by_sample[(left[:, 0] == right[:, 0]) | (left[:, 0].isnan() & right[:, 0].isnan())] = 0.0
    by_sample = by_sample.nan_to_num(nan=math.inf)
    worst = int(by_sample.argmax())
    scale = float(left[:, 1].nan_to_num().max())
    module = name.partition("[")[0].partition("#")[0]
    difference = _ratio(float(by_sample[worst]), scale)
    return Place(
        stage, name, one.kinds.get(module, "") if stage == "module" else "", difference, int(one.samples[worst])
    )


def _loss(one: Heard, other: Heard) -> Place:
    (loss, count), (other_loss, other_count) = (
        (math.fsum(part for part, _ in heard.losses), math.fsum(part for _, part in heard.losses))
        for heard in (one, other)
    )
    difference = max(_ratio(abs(loss - other_loss), abs(loss)), _ratio(abs(count - other_count), abs(count)))
    if math.isnan(difference):
        difference = 0.0 if math.isnan(loss) and math.isnan(other_loss) else math.inf
    name = f"with sum {loss:.6g} and count {count:g}, here {other_loss:.6g} and {other_count:g}"
    return Place("loss", name, "", difference)


def _gradients(one: Heard, other: Heard) -> Iterator[Place]:
    """From the last module that was called to the first, as the backward pass goes."""
    last_call = {key.removeprefix("module/").partition("#")[0]: place for place, key in enumerate(one.calls)}
    differences = gradient_differences(one, other)
    for name in sorted(differences, key=lambda name: -last_call.get(_owner(name), -1)):
        yield Place("gradient", name, _kind(one, name), differences[name])


def _relative(one: Mapping[str, Tensor], other: Mapping[str, Tensor], floor: float) -> dict[str, float]:
    """A tensor that one side does not have counts as zeros."""
    found = {}
    for name in one.keys() | other.keys():
        left, right = one.get(name), other.get(name)
        like = left if left is not None else right
        assert like is not None
        left, right = (torch.zeros_like(like) if side is None else side for side in (left, right))
        found[name] = _ratio(largest_difference(left, right), max(_largest(left), floor))
    return dict(sorted(found.items()))


def _largest(tensor: Tensor) -> float:
    return float(tensor.to(torch.float64).abs().nan_to_num().max()) if tensor.numel() else 0.0


def _ratio(difference: float, scale: float) -> float:
    if difference == 0:
        return 0.0
    return difference / scale if scale else math.inf


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _kind(heard: Heard, parameter: str) -> str:
    return heard.kinds.get(_owner(parameter), "")

"""Comparisons to the last bit and within a tolerance, on runs and records that are made to differ in one place."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import toy_config
from outcome import only_run
from torch import nn

from trainer.checkpoint import DamagedCheckpoint
from trainer.cli import main
from trainer.run import Run
from trainer.verify import compare_steps, recording
from trainer.verify.compare_runs import compare_runs, largest_difference, same_bits
from trainer.verify.compare_steps import Heard, first_place

NAN = math.nan


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run directories of the toy recipe, with all checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    train = {"max_steps": 4, "max_epochs": None, "ema_decay": 0.9}
    cases: dict[str, dict[str, Any]] = {
        "first": {},
        "seed": {"seed": 1},
        "deeper": {"model": {"name": "toy.net", "depth": 4}},
        "scaled": {"train": {"precision": "16-mixed"}},
    }
    for name, sections in cases.items():
        sections = {
            "checkpoint": {"every_steps": 2, "keep": 9},
            **sections,
            "train": {**train, **sections.get("train", {})},
        }
        assert main(["fit", "--config", str(toy_config(folder, name=name, **sections))]) == 0
    return {name: only_run(folder, name) for name in cases}


@pytest.fixture
def copy(runs: dict[str, Path], tmp_path: Path) -> Path:
    target = tmp_path / "copy"
    shutil.copytree(runs["first"], target)
    return target


def compared(one: Path, other: Path) -> Any:
    return compare_runs(Run(one), Run(other))


def test_a_run_is_the_same_as_itself(runs: dict[str, Path]) -> None:
    found = compared(runs["first"], runs["first"])
    assert found.identical and found.state is found.entry is None
    assert found.checkpoints == 2 and found.entries == 4 + 1 + 1
    assert found.states == ["weights", "optimizer", "averaged weights", "random states", "numbers"]


def test_another_seed_differs_from_the_first_step_on_in_all_that_is_learnt(runs: dict[str, Path]) -> None:
    found = compared(runs["first"], runs["seed"])
    assert not found.identical and found.step == 1
    assert found.state.step == 2
    groups = {group.state: group for group in found.state.groups}
    assert list(groups) == ["weights", "optimizer", "averaged weights", "random states"]
    assert groups["weights"].differing <= groups["weights"].total == 16
    assert [t.name for t in groups["weights"].tensors] == ["0.bias", "0.weight", "1.0.0.bias"]
    assert all(0 < t.largest < math.inf for t in groups["weights"].tensors)
    assert found.entry.step == 1 and found.entry.key == "train/loss" and found.entry.undisturbed != found.entry.other


def test_tensors_that_only_one_run_has_differ_without_bound(runs: dict[str, Path]) -> None:
    weights = compared(runs["first"], runs["deeper"]).state.groups[0]
    assert weights.total == 20 and weights.differing >= 4
    other = compared(runs["deeper"], runs["first"]).state.groups[0]
    assert other.total == 20


def test_numbers_that_differ_are_named(runs: dict[str, Path]) -> None:
    assert any(name.startswith("scaler") for name in compared(runs["first"], runs["scaled"]).state.numbers)


@pytest.mark.parametrize(
    ("change", "step", "key"),
    [
        (lambda entries: entries[2].update({"train/loss": 7.0}), 3, "train/loss"),
        (lambda entries: entries[1].update({"more": 1.0}), 2, "more"),
        (lambda entries: entries.pop(), 4, "step"),
        (lambda entries: entries.append({"step": 5}), 5, "step"),
        (lambda entries: entries[1].update({"time": 0.0, "memory_gb": 9.0}), None, None),
    ],
)
def test_the_first_entry_that_differs_is_named(
    change: Callable[[list[dict[str, Any]]], None], step: int | None, key: str | None, runs: dict[str, Path], copy: Path
) -> None:
    entries = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    change(entries)
    (copy / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    found = compared(runs["first"], copy)
    assert found.state is None
    assert (found.entry and (found.entry.step, found.entry.key)) == (step and (step, key))


def test_a_number_that_is_none_in_both_is_the_same(runs: dict[str, Path], copy: Path) -> None:
    text = (copy / "metrics.jsonl").read_text() + '{"step": 4, "test/x": "NaN"}\n'
    (copy / "metrics.jsonl").write_text(text)
    assert compared(copy, copy).identical
    assert compared(runs["first"], copy).entry.key == "step"


def test_a_checkpoint_that_is_not_whole_is_not_compared(runs: dict[str, Path], copy: Path) -> None:
    file = copy / "checkpoints" / "step-00000002" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedCheckpoint, match="step-00000002"):
        compared(runs["first"], copy)


@pytest.mark.parametrize(
    ("one", "other", "same", "largest"),
    [
        ([1.0, 2.0], [1.0, 2.0], True, 0.0),
        ([1.0, 2.0], [1.0, 2.5], False, 0.5),
        ([0.0], [-0.0], False, 0.0),
        ([NAN, 1.0], [NAN, 1.0], True, 0.0),
        ([NAN, 1.0], [1.0, 1.0], False, math.inf),
        ([math.inf], [math.inf], True, 0.0),
        ([math.inf], [1.0], False, math.inf),
        ([], [], True, 0.0),
        ([1.0], [1.0, 1.0], False, math.inf),
    ],
)
def test_tensors_are_compared_by_bits_and_by_size(
    one: list[float], other: list[float], same: bool, largest: float
) -> None:
    left, right = torch.tensor(one), torch.tensor(other)
    assert same_bits(left, right) == same
    assert largest_difference(left, right) == largest
    assert not same_bits(left, left.double())


# -- records of a step ------------------------------------------------------------------------------------------------


def heard(**changes: Any) -> Heard:
    """One step of a network of two layers on four samples."""
    table = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]], dtype=torch.float64)
    weights = {"first.weight": torch.tensor([1.0, 2.0]), "second.bias": torch.tensor([4.0])}
    made = Heard(
        step=3,
        samples=torch.tensor([4, 7, 8, 9]),
        tables={name: table.clone() for name in ("module/second", "module/first[0]", "input/[0]", "batch/x")},
        calls=["module/first", "module/second"],
        kinds={"first": "Linear", "second": "Head"},
        losses=[(2.0, 2.0), (4.0, 2.0)],
        random={"rank0/torch": "a"},
        silenced={},
        before=weights,
        gradients=[{"first.weight": torch.tensor([0.5, 1.0]), "second.bias": torch.tensor([1.0])}],
        after={**weights, "buffer": torch.tensor([3.0])},
    )
    return replace(made, **changes)


def shifted(key: str, row: int, by: float) -> dict[str, torch.Tensor]:
    tables = {name: table.clone() for name, table in heard().tables.items()}
    tables[key][row, 0] += by
    return tables


GRADIENTS = heard().gradients[0]
AFTER = heard().after
PLACES: dict[str, tuple[dict[str, Any], tuple[str, str, str], float]] = {
    "loss scale": ({"step": 4}, ("loss scale", "with step 3 as the first to be taken, here 4", ""), math.inf),
    "initialisation": (
        {"before": {**heard().before, "first.weight": torch.tensor([1.0, 2.5])}},
        ("weights before", "first.weight", "Linear"),
        0.25,
    ),
    "samples": ({"samples": torch.tensor([4, 7, 8, 10])}, ("samples", "", ""), math.inf),
    "batch": ({"tables": shifted("batch/x", 2, 2.0)}, ("batch", "x", ""), 0.05),
    "input": ({"tables": shifted("input/[0]", 1, 4.0)}, ("input", "[0]", ""), 0.1),
    "first module": ({"tables": shifted("module/first[0]", 0, 8.0)}, ("module", "first[0]", "Linear"), 0.2),
    "second module": ({"tables": shifted("module/second", 3, NAN)}, ("module", "second", "Head"), math.inf),
    "loss": ({"losses": [(3.0, 4.0)]}, ("loss", "with sum 6 and count 4, here 3 and 4", ""), 0.5),
    "count": ({"losses": [(6.0, 3.0)]}, ("loss", "with sum 6 and count 4, here 6 and 3", ""), 0.25),
    "loss that is no number": (
        {"losses": [(NAN, 4.0)]},
        ("loss", "with sum 6 and count 4, here nan and 4", ""),
        math.inf,
    ),
    "gradients": (
        {"gradients": [{name: 2 * gradient for name, gradient in GRADIENTS.items()}]},
        ("gradient", "second.bias", "Head"),  # where the backward pass begins
        1.0,
    ),
    "no gradient": (
        {"gradients": [{"second.bias": GRADIENTS["second.bias"]}]},
        ("gradient", "first.weight", "Linear"),
        1.0,
    ),
    "weights": (
        {"after": {**AFTER, "second.bias": torch.tensor([5.0])}},
        ("weights after", "second.bias", "Head"),
        0.25,
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_difference_is_found_where_it_begins(name: str) -> None:
    changes, place, difference = PLACES[name]
    found = first_place(heard(), heard(**changes), 1e-4)
    assert found is not None and (found.stage, found.name, found.kind) == place
    assert found.difference == pytest.approx(difference)
    assert found.sample == {"batch": 8, "input": 7, "first module": 4, "second module": 9}.get(name)


def test_what_is_the_same_or_within_the_tolerance_has_no_place() -> None:
    assert first_place(heard(), heard(), 0.0) is None
    assert first_place(heard(), heard(tables=shifted("batch/x", 2, 2.0)), 0.06) is None
    assert first_place(heard(), heard(after={**AFTER, "second.bias": torch.tensor([4.1])}), 1e-4, 0.05) is None


def test_a_step_without_a_sample_can_be_compared() -> None:
    empty = {"samples": torch.tensor([], dtype=torch.int64), "losses": []}
    tables = {name: table[:0] for name, table in heard().tables.items()}
    assert first_place(heard(**empty, tables=tables), heard(**empty, tables=tables), 0.0) is None
    nan = heard(losses=[(NAN, 2.0)])
    assert first_place(nan, nan, 1e-4) is None


def test_exact_comparison_looks_at_random_states_and_buffers_too() -> None:
    other = heard(random={"rank0/torch": "b"})
    assert first_place(heard(), other, 1e-4) is None
    found = first_place(heard(), other, 0.0)
    assert found is not None and (found.stage, found.name) == ("random state", "rank0/torch")
    moved = heard(after={**AFTER, "buffer": torch.tensor([3.5])})
    assert first_place(heard(), moved, 1e-4) is None  # statistics of a batch depend on how it is cut
    found = first_place(heard(), moved, 0.0)
    assert found is not None and (found.stage, found.name) == ("weights after", "buffer")


def test_elements_whose_gradient_is_rounding_are_left_out_of_the_weights() -> None:
    gradients = [{"first.weight": torch.tensor([1e-9, 1.0]), "second.bias": torch.tensor([1.0])}]
    noisy = [{"first.weight": torch.tensor([-1e-9, 1.0]), "second.bias": torch.tensor([1.0])}]
    one, other = (
        heard(gradients=gradients),
        heard(gradients=noisy, after={**AFTER, "first.weight": torch.tensor([3.0, 2.0])}),
    )
    assert first_place(one, other, 1e-4) is None
    both = heard(gradients=noisy, after={**AFTER, "first.weight": torch.tensor([1.0, 3.0])})
    found = first_place(one, both, 1e-4)
    assert found is not None and found.name == "first.weight"
    # In a gradient that differs itself, nothing passes as noise.
    wrong = replace(both, gradients=[{**noisy[0], "first.weight": torch.tensor([0.5, 2.0])}])
    assert compare_steps.weight_differences(one, wrong, 1e-4)["first.weight"] == pytest.approx(0.5)


def test_gradients_that_are_zero_but_for_rounding_are_compared_with_the_others() -> None:
    one = heard(gradients=[{"first.weight": torch.tensor([1e-8, 0.0]), "second.bias": torch.tensor([1.0])}])
    other = heard(gradients=[{"first.weight": torch.tensor([-1e-8, 0.0]), "second.bias": torch.tensor([1.0])}])
    assert compare_steps.gradient_differences(one, other)["first.weight"] == pytest.approx(2e-6)


def test_a_sample_has_the_same_numbers_however_the_batch_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    output = torch.randn(7, 3, 5)
    whole = recording.summary(output)
    assert whole.shape == (7, 2) and whole.dtype == torch.float64
    assert torch.allclose(whole[:, 1], output.double().flatten(1).norm(dim=1))
    assert torch.allclose(whole, torch.cat([recording.summary(output[:4]), recording.summary(output[4:])]))
    monkeypatch.setattr(recording, "ROWS_BYTES", 1)
    assert torch.allclose(whole, recording.summary(output))
    changed = output.clone()
    changed[3, 1, 2] += 1e-6
    differing = (recording.summary(changed) != recording.summary(output)).any(1).nonzero().flatten()
    assert differing.tolist() == [3]


def test_what_each_rank_draws_for_itself_is_switched_off() -> None:
    from timm.layers import DropPath
    from torchvision.ops import StochasticDepth

    parts = [nn.Dropout(0.1), nn.Dropout2d(0.2), nn.Dropout(0.0), DropPath(0.1), StochasticDepth(0.1, "row")]
    model = nn.Sequential(*parts, nn.MultiheadAttention(4, 2, dropout=0.1))
    found = recording.silence(model)
    assert found == Counter(Dropout=1, Dropout2d=1, DropPath=1, StochasticDepth=1, MultiheadAttention=1)
    x = torch.randn(8, 4, 2, 2)
    model.train()
    assert all(torch.equal(part(x), x) for part in parts)
    assert recording.silence(model) == Counter()

"""A predictor answers each sample alone, whatever the others of its batch are, and proves itself on golden requests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import environment
from torch import nn

from serving.bundle import Bundle, finish
from serving.errors import BadBundle, BadInput, ServingError
from serving.predictor import Predictor, deviation_of, read_golden

ROWS = 40


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 2 * x, x.sum(1)


def make(folder: Path, golden: list[dict[str, Any]] | None = None, **program: Any) -> Bundle:
    """A bundle of `Doubled` with golden requests, 40 where none are given."""
    folder.mkdir()
    exported = torch.export.export(Doubled(), (torch.ones(2, 3),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(exported, folder / "program.pt2")
    if golden is None:
        rows = np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32)
        golden = [
            {"request": row.tolist(), "outputs": {"d": (2 * row).tolist(), "s": float(row.sum())}} for row in rows
        ]
    (folder / "golden.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in golden))
    one = {"dtype": "float32", "unit": "", "description": ""}
    fields: dict[str, Any] = {
        "inputs": [{"name": "x", "shape": [-1, 3], **one}],
        "outputs": [{"name": "d", "shape": [-1, 3], **one}, {"name": "s", "shape": [-1], **one}],
        "labels": None,
    }
    return finish(
        folder,
        {
            "name": "doubled",
            "task": "test",
            "program": {"runtime": "pt2", "file": "program.pt2", "dtype": "float32", "max_batch": None, **program},
            "preprocessing": {"kind": "tensor"},
            "signature": fields,
            "postprocessing": {"kind": "tensor"},
            "golden": {"file": "golden.jsonl", "count": len(golden), "tolerance": 1e-4},
            "metrics": {},
            "run": {},
            "warmup_batches": [1],
        },
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make(tmp_path_factory.mktemp("predictor") / "bundle")


def test_rows_in_their_order(bundle: Bundle) -> None:
    predictor = Predictor.open(bundle)
    rows = np.random.default_rng(1).normal(size=(9, 3)).astype(np.float32)
    for count in (0, 1, 2, 9):
        found = predictor.predict([(row,) for row in rows[:count]])
        assert len(found) == count
        for row, answer in zip(rows[:count], found, strict=True):
            assert isinstance(answer, tuple)
            assert np.array_equal(answer[0], 2 * row) and np.allclose(answer[1], row.sum())
    answer = predictor.predict([(rows[0],)])[0]
    assert isinstance(answer, tuple)
    assert predictor.render(answer)["d"] == (2 * rows[0]).tolist()


def test_one_bad_sample_leaves_the_others_alone(bundle: Bundle) -> None:
    """By the program: it is then run on each alone; or by what prepares it."""
    calls: list[int] = []

    def run(batch: list[Any]) -> list[Any]:
        calls.append(len(batch[0]))
        if (batch[0] == 13).any():
            raise RuntimeError("thirteen")
        return [2 * batch[0], batch[0].sum(1)]

    predictor = Predictor(bundle, run)
    samples = [(np.full(3, value, np.float32),) for value in (1, 13, 2)]
    found = predictor.predict(samples)
    assert [type(answer) for answer in found] == [tuple, RuntimeError, tuple]
    assert calls == [3, 1, 1, 1]

    def prepare(sample: Any) -> Any:
        if sample[0][0] == 2:
            raise BadInput("instances[2]", "two")
        return sample

    predictor.input.prepare = prepare  # type: ignore[method-assign]
    assert [type(answer) for answer in predictor.predict(samples)] == [tuple, RuntimeError, BadInput]


def test_samples_of_other_shapes_are_run_apart(bundle: Bundle) -> None:
    seen: list[tuple[int, ...]] = []

    def run(batch: list[Any]) -> list[Any]:
        seen.append(batch[0].shape)
        return [2 * batch[0], batch[0].sum(1)]

    found = Predictor(bundle, run).predict([(np.ones(size, np.float32),) for size in (3, 4, 3, 5)])
    assert sorted(seen) == [(1, 4), (1, 5), (2, 3)]
    assert [answer[0].shape for answer in found if isinstance(answer, tuple)] == [(3,), (4,), (3,), (5,)]


def test_no_batch_is_larger_than_the_program_takes(tmp_path: Path) -> None:
    predictor = Predictor.open(make(tmp_path / "b", max_batch=4))
    sizes: list[int] = []
    run = predictor.run_batch
    predictor.run_batch = lambda batch: (sizes.append(len(batch[0])), run(batch))[1]  # type: ignore[method-assign]
    assert len(predictor.predict([(np.ones(3, np.float32),)] * 9)) == 9 and sizes == [4, 4, 1]


def test_a_program_that_gives_something_else_is_told(bundle: Bundle) -> None:
    (answer,) = Predictor(bundle, lambda batch: [batch[0]]).predict([(np.ones(3, np.float32),)])
    assert isinstance(answer, ServingError) and "gives 1 outputs" in str(answer)


def test_golden_requests(bundle: Bundle, tmp_path: Path) -> None:
    replay = Predictor.open(bundle).replay()
    assert replay.ok and replay.count == ROWS and replay.deviation < 1e-6
    requests, answers = read_golden(bundle)
    wrong = [
        {"request": request, "outputs": {"d": (d + 0.001 * (number == 7)).tolist(), "s": s.tolist()}}
        for number, (request, (d, s)) in enumerate(zip(requests, answers, strict=True))
    ]
    replay = Predictor.open(make(tmp_path / "b", wrong)).replay()
    assert not replay.ok and replay.deviation == pytest.approx(0.001, rel=0.2)


def test_a_model_that_gives_nan_is_not_ready(bundle: Bundle) -> None:
    replay = Predictor(bundle, lambda batch: [batch[0] * np.nan, batch[0].sum(1)]).replay()
    assert not replay.ok


def test_no_golden_request_is_no_proof(tmp_path: Path) -> None:
    with pytest.raises(BadBundle, match="has 0 requests"):
        Predictor.open(make(tmp_path / "b", [])).replay()
    entry = {"request": [1, 2], "outputs": {"d": [2, 4, 6], "s": 6}}
    with pytest.raises(BadBundle, match=r"golden\[0\]: shape"):
        Predictor.open(make(tmp_path / "c", [entry])).replay()


def test_deviation_is_relative_above_one() -> None:
    assert deviation_of(np.array([0.5]), np.array([0.25])) == 0.25
    assert deviation_of(np.array([110.0]), np.array([100.0])) == pytest.approx(0.1)
    assert deviation_of(np.ones(2), np.ones(3)) == float("inf")
    assert deviation_of(np.ones(0), np.ones(0)) == 0.0


def test_what_is_no_program(tmp_path: Path) -> None:
    made = make(tmp_path / "b")
    made.file("program.pt2").write_bytes(b"PK not one")
    with pytest.raises(BadBundle, match=r"is no program of torch\.export"):
        Predictor.open(made)
    with pytest.raises(ServingError, match="unknown 'tf'"):
        Predictor.open(make(tmp_path / "c", runtime="tf"))


def test_it_needs_nothing_of_the_training(bundle: Bundle) -> None:
    code = (
        "import sys; from serving.bundle import Bundle; from serving.predictor import Predictor\n"
        "assert Predictor.open(Bundle.read(sys.argv[1])).replay().ok\n"
        "assert not {'trainer', 'recipes', 'lightning'} & {name.partition('.')[0] for name in sys.modules}"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle.path)], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr

"""Checkpoints on disk: whole or not at all, damage named, the good ones kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from trainer import checkpoint
from trainer.checkpoint import Manifest
from trainer.errors import UserError
from trainer.tensor_file import write_tensors


def make(folder: Path, step: int, **metrics: float) -> Path:
    """A published checkpoint of two files."""
    target = checkpoint.unfinished_folder(folder, step)
    target.mkdir(parents=True)
    entry = write_tensors(target / "model.safetensors", {"w": torch.full((100,), float(step))})
    (target / "state.json").write_text("{}")
    state = {"sha256": checkpoint.hash_file(target / "state.json"), "size": 2}
    files = {"model.safetensors": entry, "state.json": state}
    return checkpoint.publish(target, Manifest(step, 10 * step, 1, False, metrics, files))


def newest(folder: Path) -> tuple[int | None, list[str]]:
    said: list[str] = []
    found = checkpoint.newest_whole(folder, said.append)
    return (found.manifest.step if found else None), said


def test_the_newest_whole_one_is_found(tmp_path: Path) -> None:
    assert newest(tmp_path / "none") == (None, [])
    for step in (5, 100, 20):
        make(tmp_path, step)
    assert newest(tmp_path) == (100, [])


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing file", "manifest cut", "no manifest", "manifest text"])
def test_a_damaged_one_is_named_and_the_one_before_it_taken(tmp_path: Path, damage: str) -> None:
    make(tmp_path, 1)
    path = make(tmp_path, 2)
    weights, manifest = path / "model.safetensors", path / "manifest.json"
    if damage == "flip":
        data = bytearray(weights.read_bytes())
        data[-7] ^= 1
        weights.write_bytes(data)
    elif damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "missing file":
        weights.unlink()
    elif damage == "manifest cut":
        manifest.write_bytes(manifest.read_bytes()[:40])
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(json.dumps({"format_version": 1, "step": "two"}))
    step, said = newest(tmp_path)
    assert step == 1
    assert len(said) == 1 and "step-00000002 is damaged" in said[0]
    assert ("manifest" if "manifest" in damage else "model.safetensors") in said[0]


def test_a_newer_format_is_refused_not_skipped(tmp_path: Path) -> None:
    make(tmp_path, 1)
    path = make(tmp_path, 2) / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(UserError, match=r"format 99.*upgrade"):
        newest(tmp_path)


def test_what_a_killed_process_left_is_removed_and_never_taken(tmp_path: Path) -> None:
    make(tmp_path, 1)
    half = checkpoint.unfinished_folder(tmp_path, 2)
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert newest(tmp_path) == (1, [])
    checkpoint.remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_retention_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step, value in ((1, 0.5), (2, 0.9), (3, 0.7), (4, 0.9), (5, 0.1)):
        make(tmp_path, step, **{"val/accuracy": value})
    best = checkpoint.best(tmp_path, "val/accuracy", "max")
    assert best is not None and best.manifest.step == 2, "the older of two equals"
    lowest = checkpoint.best(tmp_path, "val/accuracy", "min")
    assert lowest is not None and lowest.manifest.step == 5
    removed = checkpoint.clean_up(tmp_path, 2, "val/accuracy", "max")
    assert sorted(path.name for path in removed) == ["step-00000001", "step-00000003"]
    assert [path.name for path in checkpoint.present(tmp_path)] == ["step-00000002", "step-00000004", "step-00000005"]


def test_retention_does_not_count_an_unreadable_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make(tmp_path, step)
    (tmp_path / "step-00000003" / "manifest.json").write_text("{")
    checkpoint.clean_up(tmp_path, 1, None, "max")
    assert newest(tmp_path)[0] == 2


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    make(tmp_path, 7)
    (tmp_path / "step-00000007" / "model.safetensors").write_bytes(b"damaged")
    make(tmp_path, 7)
    assert newest(tmp_path) == (7, [])
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]

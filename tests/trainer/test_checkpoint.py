"""Checkpoints on disk: whole or not at all, damage named, the good ones kept."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

from trainer import checkpoint
from trainer.checkpoint import DamagedCheckpoint, Manifest
from trainer.errors import UserError
from trainer.retention import clean_up
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


def make_newer(folder: Path, step: int) -> Path:
    """A checkpoint that a later version has written."""
    path = make(folder, step)
    content = {**json.loads((path / "manifest.json").read_text()), "format_version": 99, "shape": "another"}
    (path / "manifest.json").write_bytes(checkpoint.sealed(content))
    return path


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
    make_newer(tmp_path, 2)
    with pytest.raises(UserError, match=r"format 99.*upgrade"):
        newest(tmp_path)


def test_a_newer_format_is_neither_removed_nor_the_best_nor_in_the_way_of_either(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make(tmp_path, step, **{"val/accuracy": step / 10})
    make_newer(tmp_path, 9)
    best = checkpoint.best(tmp_path, "val/accuracy", "max")
    assert best is not None and best.manifest.step == 3
    assert [path.name for path in clean_up(tmp_path, 1, None, "max", pytest.fail)] == ["step-00000001", "step-00000002"]
    assert [path.name for path in checkpoint.present(tmp_path)] == ["step-00000003", "step-00000009"]


def test_the_first_format_is_still_read(tmp_path: Path) -> None:
    path = make(tmp_path, 3)
    raw = json.loads((path / "manifest.json").read_text())
    first = {key: raw[key] for key in ("step", "consumed", "world_size", "sharded", "metrics", "files")}
    (path / "manifest.json").write_text(json.dumps({**first, "format_version": 1}))
    assert newest(tmp_path) == (3, [])
    manifest = checkpoint.read(path).manifest
    assert (manifest.format_version, manifest.global_batch, manifest.consumed) == (1, 0, 30)


SMUGGLED = {
    "step": ["9", -1, True, None, 2.0, 5],
    "consumed": ["many", [], None],
    "world_size": [{}, "1"],
    "sharded": [1, None],
    "metrics": [None, [], {"val/loss": "low"}, {"val/loss": None}, {"val/loss": True}],
    "files": [
        [],
        {},
        {"state.json": "a hash"},
        {"state.json": {"sha256": "0"}},
        {"state.json": {"sha256": None, "size": 2}},
        {"state.json": {"sha256": "0", "size": -2}},
        {"state.json": {"sha256": "0", "size": 2}, "../../run.json": {"sha256": "0", "size": 2}},
        {"state.json": {"sha256": "0", "size": 2}, "/etc/passwd": {"sha256": "0", "size": 2}},
        {"state.json": {"sha256": "0", "size": 2}, "a\0b": {"sha256": "0", "size": 2}},
    ],
    "global_batch": [1.5, "x", None],
    "format_version": [0, -1, True, "2", None, 2.0],
    "unknown": [1],
}


@pytest.mark.parametrize("name", SMUGGLED)
def test_a_manifest_of_odd_values_is_damaged_also_with_a_right_checksum(name: str, tmp_path: Path) -> None:
    path = make(tmp_path, 2)
    raw = json.loads((path / "manifest.json").read_text())
    for value in SMUGGLED[name]:
        (path / "manifest.json").write_bytes(checkpoint.sealed({**raw, name: value}))
        with pytest.raises(DamagedCheckpoint, match=r"^step-00000002 is damaged \(manifest.json: "):
            checkpoint.read(path)
    (path / "manifest.json").write_bytes(checkpoint.sealed({key: value for key, value in raw.items() if key != name}))
    if name not in ("global_batch", "unknown"):
        with pytest.raises(DamagedCheckpoint):
            checkpoint.read(path)


@pytest.mark.parametrize("text", [b"", b"[" * 100_000, b"null", b"\xff\xfe", b'{"a":' * 50_000, b"1e999", b"9" * 5000])
def test_text_that_is_no_manifest_is_damaged(text: bytes, tmp_path: Path) -> None:
    path = make(tmp_path, 2)
    (path / "manifest.json").write_bytes(text)
    with pytest.raises(DamagedCheckpoint, match=r"manifest.json: "):
        checkpoint.read(path)


def test_a_flipped_bit_of_the_manifest_is_found_unless_it_says_the_same(tmp_path: Path) -> None:
    path = make(tmp_path, 2, **{"val/loss": 0.1 + 0.2})
    whole = (path / "manifest.json").read_bytes()
    expected = checkpoint.read(path).manifest
    unnoticed = []
    for place, bit in itertools.product(range(len(whole)), range(8)):
        data = bytearray(whole)
        data[place] ^= 1 << bit
        (path / "manifest.json").write_bytes(data)
        try:
            assert checkpoint.read(path).manifest == expected
            unnoticed.append(bytes(data))
        except DamagedCheckpoint:
            continue
    assert all(b"0.3000000000000000" in text for text in unnoticed), "another last digit is the same number"
    assert len(unnoticed) < 8


def test_renamed_and_swapped_folders_are_damaged(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make(tmp_path, step)
    (tmp_path / "step-00000003").rename(tmp_path / "step-00000007")
    (tmp_path / "step-00000002").rename(tmp_path / "aside")
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000002")
    (tmp_path / "aside").rename(tmp_path / "step-00000001")
    step, said = newest(tmp_path)
    assert step is None
    assert [line.partition(" (")[2] for line in said] == [
        f"manifest.json: it is that of step-0000000{own}); using the one before it" for own in (3, 1, 2)
    ]


def test_what_is_no_folder_is_damaged_and_can_be_set_aside_and_replaced(tmp_path: Path) -> None:
    make(tmp_path, 1)
    (tmp_path / "step-00000002").write_text("a file")
    (tmp_path / "step-00000003").symlink_to("nowhere")
    step, said = newest(tmp_path)
    assert step == 1 and len(said) == 2 and "step-00000003 is damaged (manifest.json: No such file" in said[0]
    make(tmp_path, 2)
    for _ in range(2):
        assert checkpoint.set_aside(tmp_path / "step-00000003").is_symlink()
        (tmp_path / "step-00000003").symlink_to("nowhere")
    make(tmp_path, 3)
    assert newest(tmp_path) == (3, [])


def test_names_of_others_are_left_alone_and_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 3):
        make(tmp_path, step)
    for name in ("step-00000003.bak", "step-3", "notes"):
        (tmp_path / name).mkdir()
    assert [checkpoint.step_of(path) for path in checkpoint.present(tmp_path)] == [3, 99_999_999, 100_000_000]
    clean_up(tmp_path, 1, None, "max", pytest.fail)
    assert newest(tmp_path) == (100_000_000, []) and (tmp_path / "step-00000003.bak").is_dir()


def test_a_folder_of_checkpoints_that_is_none_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("disk-that-is-not-mounted")
    (tmp_path / "file").write_text("")
    for name in ("link", "file"):
        with pytest.raises(UserError, match=rf"{name}: the checkpoints can't be read \(.*put the folder back"):
            newest(tmp_path / name)


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
    removed = clean_up(tmp_path, 2, "val/accuracy", "max", pytest.fail)
    assert sorted(path.name for path in removed) == ["step-00000001", "step-00000003"]
    assert [path.name for path in checkpoint.present(tmp_path)] == ["step-00000002", "step-00000004", "step-00000005"]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_retention_does_not_count_an_unreadable_one(tmp_path: Path) -> None:
    said: list[str] = []
    for step in (1, 2, 3):
        make(tmp_path, step)
    (tmp_path / "step-00000003" / "manifest.json").write_text("{")
    clean_up(tmp_path, 1, None, "max", said.append)
    assert newest(tmp_path)[0] == 2
    assert len(said) == 1 and "it is kept as damaged-step-00000003" in said[0]


def test_retention_reads_back_what_it_keeps_before_it_removes_anything(tmp_path: Path) -> None:
    said: list[str] = []
    for step in (1, 2, 3):
        make(tmp_path, step)
    flip(tmp_path / "step-00000003" / "model.safetensors")
    assert [path.name for path in clean_up(tmp_path, 1, None, "max", said.append)] == ["step-00000001"]
    assert newest(tmp_path) == (2, [])
    (line,) = said
    assert line.startswith("step-00000003 is damaged (model.safetensors: its sha256 differs); it is kept as damaged-")

    make(tmp_path, 4)
    for step in (2, 4):
        flip(tmp_path / f"step-0000000{step}" / "model.safetensors")
    assert clean_up(tmp_path, 1, None, "max", said.append) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"damaged-step-0000000{step}" for step in (2, 3, 4)]


def test_retention_reads_nothing_where_nothing_is_to_be_removed(tmp_path: Path) -> None:
    for step in (1, 2):
        make(tmp_path, step)
    flip(tmp_path / "step-00000002" / "model.safetensors")
    assert clean_up(tmp_path, 2, None, "max", pytest.fail) == []


def test_a_replacement_that_was_killed_in_the_middle_keeps_the_old_one(tmp_path: Path) -> None:
    path = make(tmp_path, 4)
    path.rename(tmp_path / ".unfinished-replaced-step-00000004")
    shutil.copytree(tmp_path / ".unfinished-replaced-step-00000004", tmp_path / ".unfinished-step-00000004")
    (tmp_path / ".unfinished-a-file").write_text("")
    checkpoint.remove_unfinished(tmp_path)
    assert newest(tmp_path) == (4, []) and [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    make(tmp_path, 7)
    (tmp_path / "step-00000007" / "model.safetensors").write_bytes(b"damaged")
    make(tmp_path, 7)
    assert newest(tmp_path) == (7, [])
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]

"""A bundle is what was exported, or it is refused in one line that says what is wrong."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from serving.bundle import FORMAT_VERSION, MANIFEST, Bundle, content_hash, finish
from serving.errors import BadBundle

CONTENT: dict[str, Any] = {
    "name": "digits",
    "task": "image_classification",
    "program": {"runtime": "pt2", "file": "program.pt2", "dtype": "float32", "max_batch": None},
    "preprocessing": {"kind": "tensor"},
    "signature": {
        "inputs": [{"name": "x", "dtype": "float32", "shape": [-1, 3], "unit": "m", "description": ""}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": [-1], "unit": "", "description": ""}],
        "labels": None,
    },
    "postprocessing": {"kind": "tensor"},
    "golden": {"file": "golden.jsonl", "count": 1, "tolerance": 1e-4},
    "metrics": {"val/loss": 0.25},
    "run": {"id": "r1"},
    "warmup_batches": [1],
}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    folder = tmp_path / "bundle"
    (folder / "deep").mkdir(parents=True)
    (folder / "program.pt2").write_bytes(random.Random(1).randbytes(5000))
    (folder / "deep" / "é.txt").write_text("ü")
    (folder / "golden.jsonl").write_text("{}\n")
    return finish(folder, CONTENT)


def test_what_is_written_is_read(bundle: Bundle) -> None:
    assert sorted(bundle.files) == ["deep/é.txt", "golden.jsonl", "program.pt2"]
    assert bundle.signature.inputs[0].shape == (-1, 3)
    assert (bundle.metrics, bundle.warmup_batches, bundle.adapters) == ({"val/loss": 0.25}, (1,), {})
    bundle.verify()


def test_version_is_of_the_content(bundle: Bundle, tmp_path: Path) -> None:
    manifest = json.loads((bundle.path / MANIFEST).read_text())
    assert bundle.version == content_hash(manifest) and len(bundle.version) == 12
    copy = tmp_path / "copy"
    shutil.copytree(bundle.path, copy)
    assert Bundle.read(copy).version == bundle.version
    (copy / "golden.jsonl").write_text("{} \n")
    assert finish(copy, CONTENT).version != bundle.version


def test_any_byte_that_changes_is_found(bundle: Bundle) -> None:
    """In every file, the manifest included."""
    draw = random.Random(2)
    for name in [*bundle.files, MANIFEST]:
        file = bundle.path / name
        whole = file.read_bytes()
        for _ in range(20):
            place = draw.randrange(len(whole))
            changed = bytearray(whole)
            changed[place] ^= 1 << draw.randrange(8)
            file.write_bytes(changed)
            with pytest.raises(BadBundle) as told:
                Bundle.read(bundle.path).verify()
            assert "\n" not in str(told.value) and str(bundle.path) in str(told.value)
        file.write_bytes(whole)
    Bundle.read(bundle.path).verify()


def test_cut_off_and_missing_files(bundle: Bundle) -> None:
    (bundle.path / "program.pt2").write_bytes(b"x")
    with pytest.raises(BadBundle, match=r"program\.pt2 is not the file that was exported"):
        bundle.verify()
    (bundle.path / "program.pt2").unlink()
    with pytest.raises(BadBundle, match=r"program\.pt2 can't be read \(No such file"):
        bundle.verify()


def test_newer_format_is_told_to_upgrade(bundle: Bundle) -> None:
    manifest = json.loads((bundle.path / MANIFEST).read_text())
    (bundle.path / MANIFEST).write_text(json.dumps({**manifest, "format": FORMAT_VERSION + 1, "unheard": {}}))
    with pytest.raises(BadBundle, match=f"bundle format {FORMAT_VERSION + 1}, and this version reads up to"):
        Bundle.read(bundle.path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.pop("golden"), "wrong or missing fields: golden"),
        (lambda m: m.update(colour="red"), "wrong or missing fields: colour"),
        (lambda m: m["program"].update(zzz=1), "wrong values: TypeError"),
        (lambda m: m["signature"]["inputs"][0].update(dtype="complex64"), "unknown dtype 'complex64'"),
        (lambda m: m["signature"]["inputs"][0].update(shape=[3]), "does not begin with the batch"),
        (lambda m: m.update(files={"../x": {"sha256": "", "size": 0}}), "not inside the bundle"),
        (lambda m: m.update(files={"/x": {"sha256": "", "size": 0}}), "not inside the bundle"),
        (lambda m: m.update(files=[]), "wrong values"),
    ],
)
def test_a_manifest_that_was_made_by_hand(bundle: Bundle, change: Any, said: str) -> None:
    manifest = json.loads((bundle.path / MANIFEST).read_text())
    change(manifest)
    manifest["version"] = content_hash(manifest)
    (bundle.path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BadBundle, match=said):
        Bundle.read(bundle.path)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b'{"format": "1"}', b"[" * 100_000])
def test_what_is_no_manifest(bundle: Bundle, text: bytes) -> None:
    (bundle.path / MANIFEST).write_bytes(text)
    with pytest.raises(BadBundle):
        Bundle.read(bundle.path)


def test_no_bundle_there(tmp_path: Path) -> None:
    with pytest.raises(BadBundle, match=r"there is no such folder; make one with: trainer export RUN"):
        Bundle.read(tmp_path / "nothing")
    with pytest.raises(BadBundle, match=r"it has no bundle\.json"):
        Bundle.read(tmp_path)


def test_a_link_that_moves_on_does_not_mix_two_bundles(bundle: Bundle, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(bundle.path)
    opened = Bundle.read(link)
    link.unlink()
    link.symlink_to(tmp_path)
    opened.verify()

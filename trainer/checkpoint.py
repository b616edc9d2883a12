"""Checkpoints on disk: published whole or not at all, checked before use. No torch.

`checkpoints/step-00000100/` holds `manifest.json` (format version, step, metrics, sha256 of every file),
`state.json` (numbers), and tensors in safetensors files, or in `sharded/` as torch's distributed checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.errors import TrainerError, UserError
from trainer.files import sync_folder, write_atomically

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_PREFIX = "step-"
_UNFINISHED = ".unfinished-"
_HASH_CHUNK = 4 << 20


class DamagedCheckpoint(TrainerError):
    """A checkpoint that is not what was written; the message names it and the file."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is and of which files it consists."""

    step: int
    consumed: int
    """Samples the job had used; the position in the data."""
    world_size: int
    sharded: bool
    metrics: dict[str, float]
    """Metrics evaluated at exactly this step; empty where there was no evaluation."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By path relative to the checkpoint: `sha256` (hex) and `size` (bytes)."""
    batch_size: int = 0
    """Samples per device and micro-batch; 0 where a checkpoint of an earlier version does not say."""
    accumulate: int = 0
    """Micro-batches per optimizer step as the config says; 0 where unknown."""
    global_batch: int = 0
    """Samples per optimizer step; 0 where unknown."""
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a readable manifest; its files are checked by `verify`."""

    path: Path
    manifest: Manifest


def folder_name(step: int) -> str:
    return f"{_PREFIX}{step:08d}"


def unfinished_folder(checkpoints: Path, step: int) -> Path:
    """Where a checkpoint is written before it is published under its own name."""
    return checkpoints / f"{_UNFINISHED}{folder_name(step)}"


def hash_file(path: Path) -> str:
    """sha256 of a file, hex."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def publish(unfinished: Path, manifest: Manifest) -> Path:
    """Write the manifest last, make everything durable, then give the folder its name in one step."""
    write_atomically(unfinished / MANIFEST, json.dumps(manifest.__dict__, indent=1).encode())
    for folder in {(unfinished / name).parent for name in manifest.files} | {unfinished}:
        sync_folder(folder)
    final = unfinished.parent / folder_name(manifest.step)
    if final.exists():  # a resumed run came by this step again; the old one may be the damaged one
        replaced = unfinished.parent / f"{_UNFINISHED}replaced-{final.name}"
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
        os.replace(unfinished, final)
        shutil.rmtree(replaced)
    else:
        os.replace(unfinished, final)
    sync_folder(final.parent)
    return final


def read(path: Path) -> Checkpoint:
    """The checkpoint in folder `path`; DamagedCheckpoint where its manifest is none."""
    try:
        raw = json.loads((path / MANIFEST).read_bytes())
        version = raw["format_version"]
        if version > FORMAT_VERSION:
            raise UserError(
                f"{path} has checkpoint format {version}, this version reads up to {FORMAT_VERSION}: "
                "upgrade yaml-trainer"
            )
        manifest = Manifest(**raw)
        assert isinstance(manifest.step, int) and isinstance(manifest.files, dict)
        if "state.json" not in manifest.files:
            raise ValueError("it lists no state.json")
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise DamagedCheckpoint(f"{path.name} is damaged ({MANIFEST}: {error})") from error
    return Checkpoint(path, manifest)


def verify(checkpoint: Checkpoint) -> None:
    """Compare every file with the manifest; DamagedCheckpoint names the first that differs."""
    for name, expected in checkpoint.manifest.files.items():
        file = checkpoint.path / name
        try:
            if file.stat().st_size != expected["size"]:
                raise DamagedCheckpoint(
                    f"{checkpoint.path.name} is damaged "
                    f"({name}: {file.stat().st_size} bytes, {expected['size']} written)"
                )
            if hash_file(file) != expected["sha256"]:
                raise DamagedCheckpoint(f"{checkpoint.path.name} is damaged ({name}: its sha256 differs)")
        except OSError as error:
            raise DamagedCheckpoint(f"{checkpoint.path.name} is damaged ({name}: {error.strerror})") from error


def present(checkpoints: Path) -> list[Path]:
    """Folders of published checkpoints, oldest first."""
    if not checkpoints.is_dir():
        return []
    return sorted(path for path in checkpoints.iterdir() if path.name.startswith(_PREFIX) and path.is_dir())


def newest_whole(checkpoints: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies; each damaged one on the way is reported. None where there is none."""
    for path in reversed(present(checkpoints)):
        try:
            checkpoint = read(path)
            verify(checkpoint)
            return checkpoint
        except DamagedCheckpoint as error:
            report(f"{error}; using the one before it")
    return None


def set_aside(path: Path) -> Path:
    """Give a damaged checkpoint a name under which it is none, and return that; an earlier one of it is replaced."""
    aside = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)
    return aside


def best(checkpoints: Path, monitor: str, mode: str) -> Checkpoint | None:
    """The readable checkpoint with the best value of `monitor`, the older one where two are equal."""
    candidates = [c for c in _readable(checkpoints) if not math.isnan(c.manifest.metrics.get(monitor, math.nan))]
    sign = 1 if mode == "max" else -1
    return max(candidates, key=lambda c: (sign * c.manifest.metrics[monitor], -c.manifest.step), default=None)


def best_whole(checkpoints: Path, monitor: str, mode: str, report: Callable[[str], None]) -> Checkpoint | None:
    """The best checkpoint that verifies; each damaged one on the way is reported and set aside."""
    while (top := best(checkpoints, monitor, mode)) is not None:
        try:
            verify(top)
            return top
        except DamagedCheckpoint as error:
            report(f"{error}; it is kept as {set_aside(top.path).name}, and the next best is used")
    return None


def clean_up(checkpoints: Path, keep: int, monitor: str | None, mode: str) -> list[Path]:
    """Remove all but the `keep` newest and the best; returns what was removed."""
    kept = {c.path for c in _readable(checkpoints)[-keep:]}
    if monitor is not None and (top := best(checkpoints, monitor, mode)) is not None:
        kept.add(top.path)
    removed = []
    for path in present(checkpoints):
        if path not in kept:
            hidden = path.with_name(f"{_UNFINISHED}removed-{path.name}")
            os.replace(
                path, hidden
            )  # a crash in the middle of removal must not leave half a checkpoint with a good name
            shutil.rmtree(hidden)
            removed.append(path)
    return removed


def remove_unfinished(checkpoints: Path) -> None:
    """Remove what a killed process left half-written."""
    if checkpoints.is_dir():
        for path in checkpoints.iterdir():
            if path.name.startswith(_UNFINISHED):
                shutil.rmtree(path)


def _readable(checkpoints: Path) -> list[Checkpoint]:
    found = []
    for path in present(checkpoints):
        try:
            found.append(read(path))
        except DamagedCheckpoint:
            continue  # resume reports it; here it only must not count as one to keep
    return found

"""Checkpoints on disk: published whole or not at all, checked before use. No torch.

`checkpoints/step-00000100/` holds `manifest.json` (format version, step, metrics, sha256 of every file and of its own
content), `state.json` (numbers), and tensors in safetensors files, or in `sharded/` as torch's distributed checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from trainer.errors import TrainerError, UserError
from trainer.files import reason, remove, sync, write_atomically

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
CHECKSUM = "checksum"
_NAME = re.compile(r"step-(\d{8,})")
_UNFINISHED = ".unfinished-"
_REPLACED = f"{_UNFINISHED}replaced-"
_HASH_CHUNK = 4 << 20


class DamagedCheckpoint(TrainerError):
    """A checkpoint that is not what was written; the message names it and the file."""


class NewerFormat(UserError):
    """A checkpoint that a later version of this package has written: whole, but not to be read or removed by us."""


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
    return f"step-{step:08d}"


def unfinished_folder(checkpoints: Path, step: int) -> Path:
    """Where a checkpoint is written before it is published under its own name."""
    return checkpoints / f"{_UNFINISHED}{folder_name(step)}"


def hash_file(path: Path, from_disk: bool = False) -> str:
    """sha256 of a file, hex; `from_disk` asks the system to forget what it holds of it in memory."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_HASH_CHUNK))
    with path.open("rb", buffering=0) as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def entry(path: Path) -> dict[str, Any]:
    """What the manifest says of a file: `sha256` and `size`."""
    return {"sha256": hash_file(path), "size": path.stat().st_size}


def sealed(content: Mapping[str, Any]) -> bytes:
    """The text of a manifest: its content, with a checksum over all of it."""
    content = {key: value for key, value in content.items() if key != CHECKSUM}
    return json.dumps({**content, CHECKSUM: _checksum(content)}, indent=1).encode()


def publish(unfinished: Path, manifest: Manifest) -> Path:
    """Write the manifest last, make everything durable, then give the folder its name in one step."""
    write_atomically(unfinished / MANIFEST, sealed(asdict(manifest)))
    for folder in {(unfinished / name).parent for name in manifest.files} | {unfinished}:
        sync(folder)
    final = unfinished.parent / folder_name(manifest.step)
    if os.path.lexists(final):  # a resumed run came by this step again; the old one may be the damaged one
        replaced = unfinished.parent / f"{_REPLACED}{final.name}"
        remove(replaced)
        os.replace(final, replaced)
        os.replace(unfinished, final)
        remove(replaced)
    else:
        os.replace(unfinished, final)
    sync(final.parent)
    return final


def read(path: Path) -> Checkpoint:
    """The checkpoint in folder `path`; DamagedCheckpoint where its manifest is none, NewerFormat where it is ahead."""
    try:
        manifest = _manifest(json.loads((path / MANIFEST).read_bytes()), path)
    except OSError as error:
        raise _damaged(path, MANIFEST, reason(error)) from error
    except (ValueError, RecursionError) as error:  # RecursionError: brackets without end
        raise _damaged(path, MANIFEST, str(error)) from error
    return Checkpoint(path, manifest)


def verify(checkpoint: Checkpoint, from_disk: bool = False) -> None:
    """Compare every file with the manifest; DamagedCheckpoint names the first that differs."""
    verify_sizes(checkpoint)
    for name, expected in checkpoint.manifest.files.items():
        try:
            found = hash_file(checkpoint.path / name, from_disk)
        except OSError as error:
            raise _damaged(checkpoint.path, name, reason(error)) from error
        if found != expected["sha256"]:
            raise _damaged(checkpoint.path, name, "its sha256 differs")


def verify_sizes(checkpoint: Checkpoint) -> None:
    """The quick part of `verify`: every file is there and as long as it was."""
    for name, expected in checkpoint.manifest.files.items():
        try:
            size = (checkpoint.path / name).stat().st_size
        except OSError as error:
            raise _damaged(checkpoint.path, name, reason(error)) from error
        if size != expected["size"]:
            raise _damaged(checkpoint.path, name, f"{size} bytes, {expected['size']} written")


def present(checkpoints: Path) -> list[Path]:
    """Whatever has the name of a published checkpoint, oldest first.

    Raises UserError where `checkpoints` is there and no folder: a link to a disk that is not mounted must not be taken
    for a run that has not saved yet.
    """
    if not os.path.lexists(checkpoints):
        return []
    try:
        found = {path: _NAME.fullmatch(path.name) for path in checkpoints.iterdir()}
    except OSError as error:
        raise UserError(
            f"{checkpoints}: the checkpoints can't be read ({reason(error)}); put the folder back"
        ) from error
    return sorted((path for path, match in found.items() if match), key=step_of)


def step_of(path: Path) -> int:
    """The step in the name of a published checkpoint."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def newest_whole(checkpoints: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies; each damaged one on the way is reported. None where there is none.

    Raises NewerFormat where a later version of this package has written a newer one.
    """
    for path in reversed(present(checkpoints)):
        try:
            checkpoint = read(path)
            verify(checkpoint)
            return checkpoint
        except DamagedCheckpoint as error:
            report(f"{error}; using the one before it")
    return None


def refuse_newer_format(checkpoints: Path) -> None:
    """NewerFormat where a run would have to go on from a checkpoint of a later version; reads manifests only."""
    for path in reversed(present(checkpoints)):
        try:
            read(path)
            return
        except DamagedCheckpoint:
            continue  # for `newest_whole` to tell


def set_aside(path: Path) -> Path:
    """Give a damaged checkpoint a name under which it is none, and return that; an earlier one of it is replaced."""
    aside = path.with_name(f"damaged-{path.name}")
    remove(aside)
    os.replace(path, aside)
    return aside


def best(checkpoints: Path, monitor: str, mode: str) -> Checkpoint | None:
    """The readable checkpoint with the best value of `monitor`, the older one where two are equal."""
    candidates = [c for c in readable(checkpoints) if not math.isnan(c.manifest.metrics.get(monitor, math.nan))]
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


def remove_unfinished(checkpoints: Path) -> None:
    """Remove what a killed process left half-written."""
    for path in list(checkpoints.iterdir()) if checkpoints.is_dir() else ():
        final = path.with_name(path.name.removeprefix(_REPLACED))
        if path.name.startswith(_REPLACED) and not os.path.lexists(final):
            os.replace(path, final)  # killed before the new one had the name
        elif path.name.startswith(_UNFINISHED):
            remove(path)


def discard(path: Path) -> None:
    """Remove a published checkpoint; a crash on the way must not leave half of it under a good name."""
    hidden = path.with_name(f"{_UNFINISHED}removed-{path.name}")
    remove(hidden)
    os.replace(path, hidden)
    remove(hidden)


def readable(checkpoints: Path) -> list[Checkpoint]:
    """The checkpoints with a manifest that this version understands, oldest first; files are not compared."""
    found = []
    for path in present(checkpoints):
        try:
            found.append(read(path))
        except (DamagedCheckpoint, NewerFormat):
            continue  # resume reports it; here it only must not count as one to keep
    return found


def _damaged(path: Path, file: str, why: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"{path.name} is damaged ({file}: {why})")


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _manifest(raw: Any, path: Path) -> Manifest:
    """The manifest that `raw`, parsed JSON, is; ValueError says why it is none."""
    if not isinstance(raw, dict):
        raise ValueError("not an object")
    version = raw.get("format_version")
    if type(version) is not int or version < 1:
        raise ValueError("no format version")
    content = {key: value for key, value in raw.items() if key != CHECKSUM or version == 1}
    if version > 1 and raw.get(CHECKSUM) != _checksum(content) and (version <= FORMAT_VERSION or CHECKSUM in raw):
        raise ValueError("its checksum differs")
    if version > FORMAT_VERSION:
        raise NewerFormat(
            f"{path} has checkpoint format {version}, this version reads up to {FORMAT_VERSION}: upgrade yaml-trainer"
        )
    _check_fields(content)
    manifest = Manifest(**content)
    if path.name != folder_name(manifest.step):
        raise ValueError(f"it is that of {folder_name(manifest.step)}")
    return manifest


def _check_fields(content: dict[str, Any]) -> None:
    known = {item.name: item for item in fields(Manifest)}
    needed = {name for name, item in known.items() if item.default is MISSING}  # `files`, too
    if not needed <= content.keys() <= known.keys():
        raise ValueError(
            f"wrong fields: {', '.join(map(repr, sorted((needed - content.keys()) | (content.keys() - known))))}"
        )
    counts = ("step", "consumed", "world_size", "batch_size", "accumulate", "global_batch")
    wrong = [name for name in counts if not _is_count(content.get(name, 0))]
    wrong += [] if isinstance(content["sharded"], bool) else ["sharded"]
    metrics, files = content["metrics"], content["files"]
    if not isinstance(metrics, dict) or not all(type(value) in (int, float) for value in metrics.values()):
        wrong.append("metrics")
    if not isinstance(files, dict) or not all(_is_entry(name, value) for name, value in files.items()):
        wrong.append("files")
    if wrong:
        raise ValueError(f"wrong values: {', '.join(wrong)}")
    if "state.json" not in files:
        raise ValueError("it lists no state.json")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_entry(name: str, value: Any) -> bool:
    path = PurePosixPath(name)
    is_inside = not path.is_absolute() and ".." not in path.parts and "\0" not in name
    return (
        is_inside
        and isinstance(value, dict)
        and value.keys() == {"sha256", "size"}
        and isinstance(value["sha256"], str)
        and _is_count(value["size"])
    )

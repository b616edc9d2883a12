"""A bundle: the folder that holds all that serving needs, with the hash of each file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from serving.errors import BadBundle
from serving.signature import Signature

FORMAT_VERSION = 1
MANIFEST = "bundle.json"
VERSION_LENGTH = 12
"""Hex digits of a bundle's version."""


@dataclass(frozen=True)
class Program:
    """What computes the outputs."""

    runtime: str
    """A module of `serving.runtimes`, or `transformers`."""
    file: str
    """Path in the bundle: a file, or a folder of a language model."""
    dtype: str
    """Of its weights: `float32`, `bfloat16`, `int8`, ..."""
    max_batch: int | None = None
    """Largest batch that it takes; None where any is fine."""


@dataclass(frozen=True)
class Golden:
    """Requests with the training run's own answers."""

    file: str
    count: int
    tolerance: float
    """Largest deviation of an output: |served - answered| / max(1, |answered|)."""


@dataclass(frozen=True)
class Bundle:
    """What `bundle.json` says, checked."""

    path: Path
    """The folder."""
    name: str
    version: str
    """Hash of everything else in `bundle.json`, and so of all files."""
    created: str
    task: str
    program: Program
    preprocessing: dict[str, Any]
    """`kind` is a module of `serving.inputs`, the rest its own."""
    signature: Signature
    postprocessing: dict[str, Any]
    """`kind` is a module of `serving.outputs`, the rest its own."""
    golden: Golden
    metrics: dict[str, float]
    run: dict[str, Any]
    """The training run: id, lineage, checkpoint."""
    warmup_batches: tuple[int, ...]
    files: dict[str, dict[str, Any]]
    """Path in the bundle -> sha256 and size."""
    adapters: dict[str, str] = field(default_factory=dict)
    """Name -> folder, of a language model."""

    @classmethod
    def read(cls, path: str | Path) -> Bundle:
        """Read and check `bundle.json`; the other files are looked at by `verify`.

        Raises BadBundle, which names the folder and what is wrong.
        """
        folder = Path(path)
        try:
            # A folder that is replaced meanwhile (a symlink that moves on) must not be mixed with the next one.
            folder = folder.resolve(strict=True)
            content = json.loads((folder / MANIFEST).read_bytes())
        except FileNotFoundError as error:
            what = f"it has no {MANIFEST}" if folder.is_dir() else "there is no such folder"
            raise BadBundle(f"{path}: no bundle: {what}; make one with: trainer export RUN") from error
        except OSError as error:
            raise BadBundle(f"{path}: {MANIFEST} can't be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise BadBundle(f"{path}: {MANIFEST} is damaged ({error}); export the run again") from error
        try:
            return _checked(folder, content)
        except BadBundle as error:
            raise BadBundle(f"{path}: {error}") from error

    def verify(self) -> None:
        """Compare every file with its hash. Raises BadBundle for the first that is missing or differs."""
        for name, entry in self.files.items():
            file = self.path / name
            try:
                with file.open("rb") as stream:
                    size = os.fstat(stream.fileno()).st_size
                    digest = hashlib.file_digest(stream, "sha256").hexdigest() if size == entry["size"] else ""
            except OSError as error:
                raise BadBundle(f"{self.path}: {name} can't be read ({error.strerror}); copy it again") from error
            if digest != entry["sha256"]:
                raise BadBundle(
                    f"{self.path}: {name} is not the file that was exported (its sha256 differs); copy it again"
                )

    def file(self, name: str) -> Path:
        """Path of a file that the manifest lists."""
        return self.path / name


def finish(folder: Path, content: Mapping[str, Any]) -> Bundle:
    """Hash the files of `folder` and write its `bundle.json`, which makes it a bundle.

    Args:
        content: the fields of `Bundle` but `path`, `version`, `created` and `files`, as plain data.
    """
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    manifest = {
        "format": FORMAT_VERSION,
        **content,
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "files": {name: _entry(folder / name) for name in names if name != MANIFEST},
    }
    manifest = json.loads(json.dumps(manifest, allow_nan=False))
    manifest["version"] = content_hash(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return Bundle.read(folder)


def content_hash(manifest: Mapping[str, Any]) -> str:
    """The version that goes with a manifest."""
    rest = {key: value for key, value in manifest.items() if key != "version"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:VERSION_LENGTH]


def plain(value: Any) -> Any:
    """A dataclass of this module as plain data."""
    return asdict(value)


def _entry(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"sha256": hashlib.file_digest(stream, "sha256").hexdigest(), "size": file.stat().st_size}


def _checked(folder: Path, content: Any) -> Bundle:
    if not isinstance(content, dict) or type(content.get("format")) is not int:
        raise BadBundle(f"{MANIFEST} is no bundle's: it has no format number")
    if content["format"] > FORMAT_VERSION:
        raise BadBundle(
            f"made in bundle format {content['format']}, and this version reads up to {FORMAT_VERSION}: "
            "upgrade the server, or export with the server's version"
        )
    known = {item.name for item in fields(Bundle)} - {"path"}
    found = content.keys() - {"format"}
    if wrong := sorted((known - {"adapters"} - found) | (found - known)):
        raise BadBundle(f"{MANIFEST} has wrong or missing fields: {', '.join(wrong)}")
    if content_hash(content) != content["version"]:
        raise BadBundle(f"{MANIFEST} is not as it was written (its version differs); copy it again")
    try:
        files = {str(name): _checked_entry(name, entry) for name, entry in content["files"].items()}
        return Bundle(
            path=folder,
            program=Program(**content["program"]),
            signature=Signature.from_json(content["signature"]),
            golden=Golden(**content["golden"]),
            warmup_batches=tuple(map(int, content["warmup_batches"])),
            files=files,
            **{
                key: content[key]
                for key in ("name", "version", "created", "task", "preprocessing", "postprocessing", "metrics", "run")
            },
            adapters=content.get("adapters", {}),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadBundle(f"{MANIFEST} has wrong values: {type(error).__name__}: {error}") from error


def _checked_entry(name: str, entry: Any) -> dict[str, Any]:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"files: {name!r} is not inside the bundle")
    return {"sha256": str(entry["sha256"]), "size": int(entry["size"])}

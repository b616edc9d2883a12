"""From the paths of a config to rows: which files there are, of which split, how each is read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recipes.language.conversations import Rows
from recipes.language.places import resolve
from recipes.language.tables import ArrowRows, ParquetRows, is_saved_dataset, saved_splits
from recipes.language.text_files import TextRows, readable
from trainer.errors import UserError

TEXT = {".jsonl": ".jsonl", ".ndjson": ".jsonl", ".json": ".json", ".csv": ".csv", ".tsv": ".tsv"}
SUFFIXES = (*TEXT, ".parquet")
_SPLIT_OF = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
_SPLIT_NAME = re.compile(r"(train|validation|valid|val|dev|test)([-_.].*)?")


class JoinedRows:
    """The rows of several files, one after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self.fingerprint = hashlib.sha256("\n".join(part.fingerprint for part in parts).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, inner = self._find(index)
        return part[inner]

    def place(self, index: int) -> str:
        part, inner = self._find(index)
        return part.place(inner)

    def _find(self, index: int) -> tuple[Rows, int]:
        number = int(np.searchsorted(self._starts, index, "right")) - 1
        return self._parts[number], index - int(self._starts[number])


def find_splits(paths: str | Sequence[str], key: str) -> dict[str, list[Path]]:
    """Split -> its files (or saved folders), as the names say; all is `train` where they say nothing.

    Raises UserError for what is not there or is no kind of file that can be read.
    """
    found: dict[str, list[Path]] = {}
    for text in [paths] if isinstance(paths, str) else paths:
        for split, files in _splits_of(resolve(text, key), key).items():
            found.setdefault(split, []).extend(files)
    if not found:
        raise UserError(f"{key}: names no file")
    return found


def open_rows(files: Sequence[Path]) -> Rows:
    """The rows of all `files`, in this order."""
    parts = [_open(file) for file in files]
    return parts[0] if len(parts) == 1 else JoinedRows(parts)


def _open(path: Path) -> Rows:
    if path.is_dir():
        return ArrowRows(path)
    suffix = path.suffix.lower()
    return ParquetRows(path) if suffix == ".parquet" else TextRows(path, TEXT[suffix])


def _splits_of(path: Path, key: str) -> dict[str, list[Path]]:
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{key}: {path} is of no kind that can be read: {', '.join(SUFFIXES)} or a saved data set")
        return {"train": [path]}
    splits = saved_splits(path)
    if splits is not None:
        known = {name: [path / name] for name in splits if name in _SPLIT_OF}
        if not known:
            raise UserError(f"{key}: {path} holds the splits {', '.join(splits)}: name one of them, as {path}/SPLIT")
        return _renamed(known)
    if is_saved_dataset(path):
        return {"train": [path]}
    with readable(path):
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != ".")
    if not files:
        raise UserError(f"{key}: {path} holds no {', '.join(SUFFIXES)} and is no data set saved by `datasets`")
    return _by_name(files, key)


def _by_name(files: list[Path], key: str) -> dict[str, list[Path]]:
    """`train-00000-of-00002.parquet`, `test.jsonl`: names as on the hub."""
    matches = {file: _SPLIT_NAME.fullmatch(file.stem) for file in files}
    if not any(matches.values()):
        return {"train": files}
    other = next((file for file, match in matches.items() if match is None), None)
    if other is not None:
        raise UserError(f"{key}: {other} belongs to no split, while others of its folder do: name the files")
    by_split: dict[str, list[Path]] = {}
    for file, match in matches.items():
        assert match is not None
        by_split.setdefault(match[1], []).append(file)
    return _renamed(by_split)


def _renamed(splits: dict[str, list[Path]]) -> dict[str, list[Path]]:
    renamed: dict[str, list[Path]] = {}
    for name, files in splits.items():
        renamed.setdefault(_SPLIT_OF[name], []).extend(files)
    return renamed

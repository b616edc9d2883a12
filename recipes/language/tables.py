"""Rows of Parquet files, and of folders written by `datasets.save_to_disk` (Arrow files)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from recipes.language.text_files import content_hash, readable
from trainer.errors import UserError

_SLICE = 256
"""Rows turned into Python objects at once."""


class ParquetRows:
    """The rows of one file; one row group is held at a time."""

    def __init__(self, path: Path) -> None:
        """Raises UserError for a file that can't be read."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._path = path
        try:
            with readable(path):
                self._file = pq.ParquetFile(path)
        except pa.ArrowException as error:
            raise UserError(f"{path}: is no readable Parquet file: {_line(error)}") from error
        meta = self._file.metadata
        self._starts = np.cumsum([0, *(meta.row_group(group).num_rows for group in range(meta.num_row_groups))])
        if not self._starts[-1]:
            raise UserError(f"{path}: has no rows")
        self.fingerprint = content_hash(path)
        self._group = -1
        self._table: Any = None
        self._start, self._rows = 0, list[dict[str, Any]]()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not self._start <= index < self._start + len(self._rows):
            group = int(np.searchsorted(self._starts, index, "right")) - 1
            first = int(self._starts[group])
            offset = (index - first) // _SLICE * _SLICE
            self._start, self._rows = first + offset, self._read(group).slice(offset, _SLICE).to_pylist()
        return self._rows[index - self._start]

    def place(self, index: int) -> str:
        return f"{self._path.name}: row {index + 1}"

    def _read(self, group: int) -> Any:
        import pyarrow as pa

        if group != self._group:
            try:
                self._group, self._table = group, self._file.read_row_group(group)
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{self._path}: row group {group} can't be read: {_line(error)}") from error
        return self._table


class ArrowRows:
    """The rows of a folder written by `datasets.save_to_disk`; its files are mapped into memory."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError for a folder that can't be read."""
        import pyarrow as pa

        self._folder = folder
        hashes, self._batches = [], list[Any]()
        for file in _arrow_files(folder):
            try:
                with readable(file):
                    self._batches += list(pa.ipc.open_stream(pa.memory_map(str(file))))
            except pa.ArrowException as error:
                raise UserError(f"{file}: is no readable Arrow file: {_line(error)}") from error
            hashes.append(content_hash(file))
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        if not self._starts[-1]:
            raise UserError(f"{folder}: has no rows")
        self.fingerprint = " ".join(hashes)
        self._start, self._rows = 0, list[dict[str, Any]]()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not self._start <= index < self._start + len(self._rows):
            number = int(np.searchsorted(self._starts, index, "right")) - 1
            first = int(self._starts[number])
            offset = (index - first) // _SLICE * _SLICE
            self._start, self._rows = first + offset, self._batches[number].slice(offset, _SLICE).to_pylist()
        return self._rows[index - self._start]

    def place(self, index: int) -> str:
        return f"{self._folder.name}: row {index + 1}"


def saved_splits(folder: Path) -> list[str] | None:
    """Splits of a saved `DatasetDict`, or None where the folder holds none."""
    table = folder / "dataset_dict.json"
    return [str(name) for name in _json(table).get("splits", [])] if table.is_file() else None


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote this folder."""
    return (folder / "state.json").is_file()


def _arrow_files(folder: Path) -> list[Path]:
    state = _json(folder / "state.json")
    if state.get("_indices_data_files"):
        raise UserError(f"{folder}: holds a selection of rows; write it anew with flatten_indices().save_to_disk(...)")
    names = [str(entry.get("filename")) for entry in state.get("_data_files") or [] if isinstance(entry, dict)]
    if not names:
        raise UserError(f"{folder}: its state.json names no data files")
    return [folder / name for name in names]


def _json(file: Path) -> dict[str, Any]:
    try:
        with readable(file):
            found = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file}: is no JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0]

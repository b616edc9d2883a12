"""Rows of JSON Lines, JSON and CSV files: only where each row begins and ends is held in memory."""

from __future__ import annotations

import csv
import hashlib
import json
import mmap
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from recipes.language.cache import cache_folder, kept
from recipes.language.conversations import BadRow
from trainer.errors import UserError
from trainer.files import reason

Bounds = NDArray[np.int64]
"""[rows, 3]: first byte, byte behind the last, line or row number (1-based)."""

_BLOCK = 16 << 20
_REMEMBERED = 64 << 20
"""Bytes from which on the scan of a file is kept: it takes a second for each GB."""
_SHORT = 8
"""Bytes below which a row is looked at for being blank."""
_QUOTE, _NEWLINE = ord('"'), ord("\n")
_JSON_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[][{}]', re.DOTALL)
_BETWEEN = re.compile(rb"\s*,?\s*")


class TextRows:
    """The rows of one file; a row is read by itself, so that forked processes may read at once."""

    def __init__(self, path: Path, suffix: str) -> None:
        """`suffix` says what the file is. Raises UserError for a file that can't be read as that."""
        self._path = path
        with readable(path):
            self._file = path.open("rb")
            if suffix == ".json" and _first_byte(path) == b"{":
                suffix = ".jsonl"  # under this name, too
        self._by_line = suffix == ".jsonl"
        self._bounds, self.fingerprint = _scan(path, suffix)
        self._parse: Callable[[bytes, str], dict[str, Any]] = _object
        if suffix in (".csv", ".tsv"):
            self._parse = _Table(path, "\t" if suffix == ".tsv" else ",", self._bytes(0) if len(self._bounds) else b"")
            self._bounds = self._bounds[1:]
        if not len(self._bounds):
            raise UserError(f"{path}: has no rows")

    def __len__(self) -> int:
        return len(self._bounds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._parse(self._bytes(index), self.place(index))

    def place(self, index: int) -> str:
        number = int(self._bounds[index, 2])
        return f"{self._path.name}:{number}" if self._by_line else f"{self._path.name}: row {number}"

    def _bytes(self, index: int) -> bytes:
        start, end = int(self._bounds[index, 0]), int(self._bounds[index, 1])
        with readable(self._path):
            data = os.pread(self._file.fileno(), end - start, start)
        if len(data) < end - start:
            raise UserError(f"{self._path}: was cut short while it is in use")
        return data


class readable:
    """A context in which an error of the file system becomes one line about the data."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise UserError(f"{self._path}: cannot be read: {reason(error)}") from error


class _Table:
    """From a record of a CSV file to a row, by the names in its first record."""

    def __init__(self, path: Path, delimiter: str, header: bytes) -> None:
        csv.field_size_limit(1 << 30)  # 128 KiB by default, less than a long document
        self._delimiter = delimiter
        self._names = self._fields(header.removeprefix(b"\xef\xbb\xbf"), f"{path.name}: header")
        repeated = sorted({name for name in self._names if self._names.count(name) > 1})
        if repeated:
            raise UserError(f"{path}: the header has {repeated[0]!r} more than once")

    def __call__(self, data: bytes, place: str) -> dict[str, Any]:
        values = self._fields(data, place)
        if len(values) != len(self._names):
            raise BadRow(f"{place}: has {len(values)} fields, the header {len(self._names)}; is a quote left open?")
        return dict(zip(self._names, values, strict=True))

    def _fields(self, data: bytes, place: str) -> list[str]:
        try:
            records = list(csv.reader([data.decode()], delimiter=self._delimiter, strict=True))
        except (UnicodeDecodeError, csv.Error) as error:
            raise BadRow(f"{place}: is no CSV in UTF-8: {error}") from error
        return records[0] if records else []


def _object(data: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(data)
    except UnicodeDecodeError as error:
        raise BadRow(f"{place}: is no UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{place}: is no JSON: {error}; found {_start(data)}") from error
    if not isinstance(row, dict):
        raise BadRow(f"{place}: expected an object with keys, found {_start(data)}")
    return cast(dict[str, Any], row)


def _start(data: bytes) -> str:
    return repr(data[:40].decode(errors="replace") + ("..." if len(data) > 40 else ""))


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _scan(path: Path, suffix: str) -> tuple[Bounds, str]:
    """Where the rows are, and the hash of the file's contents.

    The scan of a large file is kept by path, size and time, as `make` would: it is looked at once, not by every rank
    at every start.
    """
    with readable(path):
        status = path.stat()
    scan = {".jsonl": _lines, ".json": _elements}.get(suffix, _records)
    if status.st_size < _REMEMBERED:
        return scan(path), content_hash(path)

    def make(folder: Path) -> dict[str, Any]:
        np.save(folder / "bounds.npy", scan(path))
        return {"sha256": content_hash(path)}

    identity = f"{path.resolve()}\0{suffix}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}\0{status.st_dev}"
    name = "scan-" + hashlib.sha256(os.fsencode(identity)).hexdigest()[:32]
    folder, about, _ = kept(cache_folder(), name, make)
    return np.load(folder / "bounds.npy", mmap_mode="r"), about["sha256"]


def content_hash(path: Path) -> str:
    with readable(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _blocks(path: Path) -> Iterator[NDArray[np.uint8]]:
    with readable(path), path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield np.frombuffer(block, np.uint8)


def _lines(path: Path) -> Bounds:
    """Lines that are not blank."""
    ends, size = [], 0
    for block in _blocks(path):
        ends.append(np.flatnonzero(block == _NEWLINE) + size)
        size += len(block)
    return _without_blank(path, _between(ends, size))


def _records(path: Path) -> Bounds:
    """Records of a CSV file: a line break within quotes is a part of the field (RFC 4180)."""
    ends, size, inside = [], 0, np.uint8(0)
    for block in _blocks(path):
        within = np.bitwise_xor.accumulate((block == _QUOTE).astype(np.uint8)) ^ inside
        ends.append(np.flatnonzero((block == _NEWLINE) & (within == 0)) + size)
        inside = within[-1]
        size += len(block)
    bounds = _between(ends, size)
    bounds[:, 2] -= 1  # the header is no row
    return _without_blank(path, bounds)


def _between(line_ends: list[NDArray[np.int64]], size: int) -> Bounds:
    ends = np.concatenate([*line_ends, np.array([size])])
    starts = np.concatenate([[0], ends[:-1] + 1])
    return np.stack([starts, ends, np.arange(1, len(ends) + 1)], axis=1).astype(np.int64)


def _without_blank(path: Path, bounds: Bounds) -> Bounds:
    """Without the short rows that hold nothing but spaces and a carriage return."""
    keep = bounds[:, 1] > bounds[:, 0]
    short = np.flatnonzero(keep & (bounds[:, 1] - bounds[:, 0] < _SHORT))
    with readable(path), path.open("rb") as file:
        for row in short.tolist():
            start, end, _ = bounds[row].tolist()
            keep[row] = bool(os.pread(file.fileno(), end - start, start).strip())
    return bounds[keep]


def _elements(path: Path) -> Bounds:
    """Objects of a JSON file that holds one list, found without reading it as a whole."""
    found: list[tuple[int, int]] = []
    depth = start = 0
    with readable(path), path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise UserError(f"{path}: is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            end_before = 3 if data[:3] == b"\xef\xbb\xbf" else 0
            for match in _JSON_TOKEN.finditer(data, end_before):
                sign = match[0]
                if depth == 0 and (sign != b"[" or data[end_before : match.start()].strip()):
                    raise UserError(f"{path}: expected a list of objects, found {_start(data[end_before:1000])}")
                if sign in (b"{", b"["):
                    depth += 1
                    if depth == 1:
                        end_before = match.end()
                    elif depth == 2:
                        start = match.start()
                        _require_gap(data, end_before, start, len(found) + 1, path)
                elif sign in (b"}", b"]"):
                    depth -= 1
                    if depth == 1:
                        end_before = match.end()
                        found.append((start, end_before))
                    elif depth == 0:
                        _require_gap(data, end_before, match.start(), len(found) + 1, path)
                        end_before = match.end()
            if depth or not end_before:
                raise UserError(f"{path}: is no whole JSON file: it ends within row {len(found) + 1}")
    bounds = np.array(found, dtype=np.int64).reshape(-1, 2)
    return np.column_stack([bounds, np.arange(1, len(bounds) + 1)])


def _require_gap(data: mmap.mmap, start: int, end: int, row: int, path: Path) -> None:
    if end - start > 1 and not _BETWEEN.fullmatch(data, start, end):
        raise UserError(f"{path}: row {row}: expected an object, found {_start(data[start:end].lstrip(b', '))}")

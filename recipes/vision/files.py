"""Files of pictures in class folders, held in a few arrays."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError

EXTENSIONS = (b".jpg", b".jpeg", b".png", b".webp", b".bmp", b".tif", b".tiff", b".gif", b".ppm", b".pgm", b".avif")
_NAMED = 5


@dataclass(frozen=True)
class Files:
    """Paths and labels of a split.

    Arrays, since a million Python strings would be copied into every data worker, page by page, as their
    reference counts change.
    """

    root: str
    text: NDArray[np.uint8]
    """All paths, relative to `root`, one after the other, as bytes of the file system."""
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def relative(self, index: int) -> bytes:
        return self.text[self.starts[index] : self.ends[index]].tobytes()

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.relative(index)))

    def select(self, indices: NDArray[np.int64]) -> Files:
        """The files at `indices`; the text of the paths is shared."""
        return replace(self, starts=self.starts[indices], ends=self.ends[indices], labels=self.labels[indices])


def join(first: Files, second: Files) -> Files:
    """The files of two splits, in this order, below a folder that holds both."""
    labels = np.concatenate([first.labels, second.labels])
    if first.root == second.root and first.text is second.text:
        starts, ends = (np.concatenate([getattr(part, key) for part in (first, second)]) for key in ("starts", "ends"))
        return replace(first, starts=starts, ends=ends, labels=labels)
    root = os.path.commonpath([first.root, second.root])
    below = [(part, os.fsencode(os.path.relpath(part.root, root)) + b"/") for part in (first, second)]
    paths = [prefix + part.relative(index) for part, prefix in below for index in range(len(part))]
    lengths = np.array([len(path) for path in paths], dtype=np.int64)
    ends = np.cumsum(lengths)
    return Files(root, np.frombuffer(b"".join(paths), np.uint8), ends - lengths, ends, labels)


def scan(folder: Path) -> tuple[tuple[str, ...], Files]:
    """Class names (sorted names of the folders in `folder`) and the pictures below each, nested ones too.

    Hidden files and folders, and files of other kinds, are ignored; links are followed.
    Raises UserError for a folder without classes, and for classes without pictures.
    """
    class_names = tuple(sorted(entry.name for entry in _entries(folder) if entry.is_dir()))
    if not class_names:
        raise UserError(f"data.path: {folder} has no class folders; expected {folder}/<class>/*.jpg")
    by_class = [sorted(_pictures(os.fsencode(folder), os.fsencode(name))) for name in class_names]
    empty = [name for name, paths in zip(class_names, by_class, strict=True) if not paths]
    if empty:
        raise UserError(
            f"data.path: class folders of {folder} without pictures: {_some(empty)} "
            f"(looked for {', '.join(e.decode() for e in EXTENSIONS)})"
        )
    lengths = np.array([len(path) for paths in by_class for path in paths], dtype=np.int64)
    ends = np.cumsum(lengths)
    return class_names, Files(
        root=str(folder),
        text=np.frombuffer(b"".join(path for paths in by_class for path in paths), np.uint8),
        starts=ends - lengths,
        ends=ends,
        labels=np.repeat(np.arange(len(class_names)), [len(paths) for paths in by_class]),
    )


def require_same_classes(split: str, found: Sequence[str], expected: Sequence[str]) -> None:
    """Raises UserError where the classes of `split` are not those of `train`."""
    more, missing = sorted(set(found) - set(expected)), sorted(set(expected) - set(found))
    parts = [f"only in {split}: {_some(more)}"] if more else []
    parts += [f"only in train: {_some(missing)}"] if missing else []
    if parts:
        raise UserError(f"data.path: the class folders of {split} and train differ: {'; '.join(parts)}")


def fingerprint(splits: Mapping[str, Files]) -> str:
    """Hash of the relative path and the size of every file; contents are not read."""
    digest = hashlib.sha256()
    for name, files in sorted(splits.items()):
        digest.update(name.encode() + b"\0")
        root, text = os.fsencode(files.root) + b"/", files.text.tobytes()
        for start, end in zip(files.starts.tolist(), files.ends.tolist(), strict=True):
            path = text[start:end]
            try:
                size = os.stat(root + path).st_size
            except OSError:
                size = -1  # a broken link, say: met again, and counted, when it is read
            digest.update(b"%s\0%d\n" % (path, size))
    return digest.hexdigest()


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"data.path: {folder} cannot be read: {error.strerror}") from error


def _pictures(root: bytes, relative: bytes, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[bytes]:
    folder = os.path.join(root, relative)
    try:
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:
            return  # a link to a folder that it is in
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                path = relative + b"/" + entry.name
                if entry.name.lower().endswith(EXTENSIONS):
                    yield path
                elif entry.is_dir():
                    yield from _pictures(root, path, above | {here})
    except OSError as error:
        raise UserError(f"data.path: {os.fsdecode(folder)} cannot be read: {error.strerror}") from error


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return f"{shown} and {len(names) - _NAMED} more" if len(names) > _NAMED else shown

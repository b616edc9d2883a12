"""Batches of pictures from files: read, decode, transform, all into one array."""

from __future__ import annotations

import os
import re
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recipes.vision.augment import Pipeline
from recipes.vision.files import Files, fingerprint, join
from recipes.vision.images import ImageInfo
from serving.pictures import Picture, UnreadableImage, centre_crop, decode
from trainer.errors import UserError
from trainer.task import Batch, Dataset, Pool, sample_seed

_NUM_PROBES = 4


@dataclass(frozen=True)
class View:
    """From a decoded picture to the model's input: transforms, then the size."""

    pipeline: Pipeline | None
    size: tuple[int, int] | None
    """Height and width to end with; None leaves what the pipeline gives."""
    fraction: float
    """Part of each side that is kept where `size` crops."""

    def __call__(self, image: Picture, seed: int) -> Picture:
        if self.pipeline is not None:
            image = self.pipeline(image, seed)
        return centre_crop(image, self.size, self.fraction) if self.size is not None else image


class FolderDataset:
    """One split: files, and how their pictures become inputs. All inputs have one shape and type."""

    def __init__(self, files: Files, view: View, channels: int, seed: int) -> None:
        """Reads a few pictures to learn the shape of the inputs. Raises UserError where they have none in common."""
        self._files = files
        self._view = view
        self._channels = channels
        self._seed = seed
        self.shape, self._dtype = self._probe()

    def __len__(self) -> int:
        return len(self._files)

    def batch(self, indices: Sequence[int], epoch: int) -> Batch:
        pixels = np.empty((len(indices), *self.shape), self._dtype)
        kept: list[int] = []
        bad: list[tuple[int, str]] = []
        for index in indices:
            try:
                image = self._input(index, epoch)
            except UnreadableImage as error:
                bad.append((index, f"{self._files.path(index)}: {error}"))
                continue
            if image.shape != self.shape or image.dtype != self._dtype:
                raise UserError(self._unequal(image, index))
            pixels[len(kept)] = image
            kept.append(index)
        index_array = np.array(kept, dtype=np.int64)
        return {
            "image": torch.from_numpy(pixels[: len(kept)]).permute(0, 3, 1, 2),
            "label": torch.from_numpy(self._files.labels[index_array]),
            "index": torch.from_numpy(index_array),
            "bad": bad,
        }

    def read(self, index: int) -> bytes:
        """The file of a sample. Raises UnreadableImage."""
        try:
            with open(self._files.path(index), "rb", buffering=0) as file:
                return file.read()
        except OSError as error:
            raise UnreadableImage(f"cannot be read: {error.strerror}") from error

    def preprocessing(self) -> dict[str, Any]:
        """How a file becomes an input, see `serving.inputs.picture.Spec`."""
        view = self._view
        return {
            "kind": "picture",
            "channels": self._channels,
            "height": self.shape[0],
            "width": self.shape[1],
            "resize": "none" if view.size is None else "crop",
            "fraction": view.fraction,
            "dtype": str(self._dtype),
            "transform": view.pipeline.serialised() if view.pipeline is not None else None,
        }

    def _input(self, index: int, epoch: int) -> Picture:
        return self._view(decode(self.read(index), self._channels), sample_seed(self._seed, epoch, index))

    def _probe(self) -> tuple[tuple[int, ...], np.dtype[Any]]:
        found: Picture | None = None
        reasons = []
        for index in np.unique(np.linspace(0, len(self) - 1, _NUM_PROBES).astype(int)).tolist():
            try:
                image = self._input(index, 0)
            except UnreadableImage as error:
                reasons.append(f"{self._files.path(index)}: {error}")
                continue
            if found is not None and (image.shape != found.shape or image.dtype != found.dtype):
                self.shape, self._dtype = found.shape, found.dtype
                raise UserError(self._unequal(image, index))
            found = image
        if found is None:
            raise UserError(f"data.path: no picture of those tried can be used: {reasons[0]}")
        return found.shape, found.dtype

    def _unequal(self, image: Picture, index: int) -> str:
        return (
            f"data: pictures end with different sizes or types: {image.dtype} {list(image.shape)} for "
            f"{self._files.path(index)}, {self._dtype} {list(self.shape)} before; set data.image_size, "
            f"or end data.augment and data.transform with a crop or Resize of one size"
        )


@dataclass(frozen=True)
class FolderData:
    """The splits of a folder; they can be cut anew, see `trainer.task.Divisible`."""

    info: ImageInfo
    files: Mapping[str, Files]
    datasets: Mapping[str, Dataset]
    evaluated: FolderDataset
    """Some split, seen as at evaluation."""
    rebuild: Callable[[Mapping[str, Files]], FolderData]

    def preprocessing(self) -> dict[str, Any]:
        return self.evaluated.preprocessing()

    def request(self, split: str, index: int) -> Any:
        dataset = self.datasets[split]
        assert isinstance(dataset, FolderDataset)
        return {"b64": b64encode(dataset.read(index)).decode("ascii")}

    @cached_property
    def fingerprint(self) -> str:
        """Computed when asked for: it looks at every file, and only rank 0 wants it."""
        return fingerprint(self.files)

    def split(self, name: str) -> Dataset | None:
        return self.datasets.get(name)

    def pool(self, group_by: str | None) -> Pool:
        """`group_by` is a regular expression, looked for in each picture's path below the folder of its split."""
        files = self._pooled()
        return Pool(len(files), files.labels, _keys(files, group_by) if group_by is not None else None)

    def divide(self, train: NDArray[np.int64], val: NDArray[np.int64] | None) -> FolderData:
        files = self._pooled()
        parts = (
            {"train": files.select(train)} if val is None else {"train": files.select(train), "val": files.select(val)}
        )
        return self.rebuild({**parts, **{name: part for name, part in self.files.items() if name == "test"}})

    def _pooled(self) -> Files:
        return join(self.files["train"], self.files["val"]) if "val" in self.files else self.files["train"]


def _keys(files: Files, pattern: str) -> NDArray[Any]:
    """What the first group of `pattern`, or all of it, matches in each path; numbers where all of them are."""
    try:
        expression = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"holdout.group_by: {pattern!r} is no regular expression: {error}") from error
    found = []
    for index in range(len(files)):
        match = expression.search(os.fsdecode(files.relative(index)))
        if match is None:
            raise UserError(f"holdout.group_by: {pattern!r} is not found in the path {files.path(index)}")
        found.append(match[1 if expression.groups else 0] or "")
    return np.array([int(text) for text in found] if all(text.isdecimal() for text in found) else found)

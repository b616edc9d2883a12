"""Data sets of grey pictures that fit in memory: batches by indexing, transforms only where asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recipes.vision.augment import Entry, Pipeline
from recipes.vision.images import ImageInfo, ImageSplits, per_channel
from serving.pictures import UnreadableImage, stretch
from trainer.errors import UserError
from trainer.task import Batch, Pool, sample_seed

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]


class ArrayDataset:
    """One split, as arrays."""

    def __init__(
        self,
        images: Pixels,
        labels: Labels,
        *,
        channels: int,
        image_size: int | None,
        pipeline: Pipeline | None,
        seed: int,
    ) -> None:
        """`images` is [N, height, width] and grey; `image_size` scales what the pipeline gives."""
        self.images = images
        self.labels = labels
        self._channels = channels
        self._image_size = image_size
        self._pipeline = pipeline
        self._seed = seed

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int], epoch: int) -> Batch:
        index = np.asarray(indices, dtype=np.int64)
        pixels = self.images[index][..., None]
        if self._channels > 1:
            pixels = np.repeat(pixels, self._channels, axis=3)
        if self._pipeline is not None and len(index):
            pixels = self._transform(self._pipeline, pixels, index, epoch)
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        if self._image_size is not None:
            images = stretch(images, (self._image_size, self._image_size))
        return {
            "image": images,
            "label": torch.from_numpy(self.labels[index]),
            "index": torch.from_numpy(index),
            "bad": [],
        }

    def preprocessing(self) -> dict[str, Any]:
        """How a picture becomes an input, see `serving.inputs.picture.Spec`."""
        image: NDArray[Any] = self.batch([0], 0)["image"].numpy()
        return {
            "kind": "picture",
            "channels": self._channels,
            "height": image.shape[2],
            "width": image.shape[3],
            "resize": "none" if self._image_size is None else "stretch",
            "dtype": str(image.dtype),
            "transform": self._pipeline.serialised() if self._pipeline is not None else None,
        }

    def _transform(self, pipeline: Pipeline, pixels: Pixels, index: Labels, epoch: int) -> Pixels:
        try:
            results = [
                pipeline(picture, sample_seed(self._seed, epoch, int(number)))
                for picture, number in zip(pixels, index, strict=True)
            ]
        except UnreadableImage as error:  # all pictures here are alike and readable: the transforms are at fault
            raise UserError(str(error)) from error
        shapes = sorted({result.shape for result in results})
        if len(shapes) > 1:
            raise UserError(
                f"data.augment, data.transform: give pictures of different sizes ({shapes[0]}, {shapes[1]}); "
                f"end with a crop or Resize of one size"
            )
        return np.stack(results)


@dataclass(frozen=True)
class ArraySplits(ImageSplits):
    """A data set that can be cut anew, see `trainer.task.Divisible`."""

    arrays: Mapping[str, tuple[Pixels, Labels]]
    """Pictures and labels of each split."""
    evaluated: ArrayDataset
    """Some split, seen as at evaluation."""
    rebuild: Callable[[Mapping[str, tuple[Pixels, Labels]]], ArraySplits]

    def preprocessing(self) -> dict[str, Any]:
        return self.evaluated.preprocessing()

    def request(self, split: str, index: int) -> Any:
        return self.arrays[split][0][index].tolist()

    def pool(self, group_by: str | None) -> Pool:
        if group_by is not None:
            raise UserError(
                f"holdout.group_by: got {group_by!r}, but these pictures have neither groups nor times: use k_fold or "
                "stratified"
            )
        return Pool(len(self._pooled(1)), labels=self._pooled(1))

    def divide(self, train: Labels, val: Labels | None) -> ArraySplits:
        images, labels = self._pooled(0), self._pooled(1)
        parts = {"train": train} if val is None else {"train": train, "val": val}
        held = {name: arrays for name, arrays in self.arrays.items() if name == "test"}
        return self.rebuild({**{name: (images[part], labels[part]) for name, part in parts.items()}, **held})

    def _pooled(self, which: int) -> NDArray[Any]:
        return np.concatenate([self.arrays[name][which] for name in ("train", "val") if name in self.arrays])


def build_splits(
    splits: Mapping[str, tuple[Pixels, Labels]],
    class_names: Sequence[str],
    *,
    augment: Sequence[Entry],
    transform: Sequence[Entry],
    image_size: int | None,
    channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
) -> ArraySplits:
    """A data set from the arrays of its splits; `augment` is for `train`, `transform` for the others."""
    rebuild = partial(
        build_splits,
        class_names=class_names,
        augment=augment,
        transform=transform,
        image_size=image_size,
        channels=channels,
        mean=mean,
        std=std,
        seed=seed,
    )
    pipelines = {
        "augment": Pipeline(augment, "data.augment") if augment else None,
        "transform": Pipeline(transform, "data.transform") if transform else None,
    }

    def view(name: str, purpose: str) -> ArrayDataset:
        pipeline = pipelines[purpose]
        return ArrayDataset(*splits[name], channels=channels, image_size=image_size, pipeline=pipeline, seed=seed)

    datasets = {name: view(name, "augment" if name == "train" else "transform") for name in splits}
    evaluated = datasets.get("val") or view("train", "transform")
    # One picture of each kind goes through its pipeline now, so that a bad one ends here and not in a data worker.
    datasets["train"].batch([0], 0)
    height, width = evaluated.batch([0], 0)["image"].shape[2:]
    info = ImageInfo(
        class_names=tuple(class_names),
        class_counts=tuple(np.bincount(splits["train"][1], minlength=len(class_names)).tolist()),
        channels=channels,
        height=height,
        width=width,
        mean=per_channel(mean, channels, "data.mean"),
        std=per_channel(std, channels, "data.std"),
    )
    return ArraySplits(info, _fingerprint(splits), datasets, splits, evaluated, rebuild)


def _fingerprint(splits: Mapping[str, tuple[Pixels, Labels]]) -> str:
    digest = hashlib.sha256()
    for name, arrays in sorted(splits.items()):
        for array in arrays:
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()

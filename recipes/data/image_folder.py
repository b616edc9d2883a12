"""Pictures in folders, as ImageNet's: `path/train/<class>/...`, `path/val/<class>/...`, maybe `path/test`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from recipes.vision.augment import Pipeline
from recipes.vision.files import Files, require_same_classes, scan
from recipes.vision.folder import FolderData, FolderDataset, View
from recipes.vision.images import ImageInfo, per_channel
from recipes.vision.splits import stratified_split
from trainer.errors import UserError

CROP = 0.875
"""Part of a picture's side that evaluation keeps: 224 of 256 pixels, as is usual for ImageNet."""


@dataclass(frozen=True)
class Config:
    path: str
    """Folder with `train/<class>/...` and, where there are such splits, `val/<class>/...` and `test/<class>/...`."""
    augment: list[str | dict[str, Any]] = field(default_factory=list)
    """Transforms of training pictures: albumentations' own names, e.g. `- RandomResizedCrop: {size: [224, 224]}`."""
    transform: list[str | dict[str, Any]] = field(default_factory=list)
    """Transforms of pictures at evaluation; empty takes the centre (7/8 of the side), scaled to the training size."""
    image_size: Annotated[int, ">= 1"] | None = None
    """Height and width that pictures end with: centre-cropped and scaled; needed where `augment` gives none."""
    channels: Literal[1, 3] = 3
    """3 for colour, 1 for grey."""
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Subtracted from pixels scaled to 0..1: one value, or one per channel. ImageNet's where not given."""
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """What they are then divided by."""
    val_fraction: Annotated[float, ">= 0", "< 1"] = 0.1
    """Part of `train` held out for `val`, the same of each class, where there is no folder `val`."""
    split_seed: Annotated[int, ">= 0", "<= 4294967295"] = 0
    """Which samples are held out; apart from the run's `seed`, so that runs share their splits."""

    def __post_init__(self) -> None:
        if min(self.std) <= 0:
            raise ValueError("std: must be above 0")


def build(config: Config, seed: int) -> FolderData:
    return _build(config, seed, *_find_splits(config))


def _build(config: Config, seed: int, class_names: tuple[str, ...], files: Mapping[str, Files]) -> FolderData:
    size = (config.image_size, config.image_size) if config.image_size is not None else None
    augment = Pipeline(config.augment, "data.augment") if config.augment else None
    transform = Pipeline(config.transform, "data.transform") if config.transform else None

    train = FolderDataset(files["train"], View(augment, size, 1.0 if augment else CROP), config.channels, seed)
    if transform is None:
        size = (train.shape[0], train.shape[1])
    view = View(transform, size, 1.0 if transform else CROP)
    datasets = {name: FolderDataset(files[name], view, config.channels, seed) for name in files if name != "train"}
    datasets["train"] = train
    evaluated = datasets.get("val") or FolderDataset(files["train"], view, config.channels, seed)
    height, width, _ = evaluated.shape
    info = ImageInfo(
        class_names=class_names,
        class_counts=tuple(np.bincount(files["train"].labels, minlength=len(class_names)).tolist()),
        channels=config.channels,
        height=height,
        width=width,
        mean=per_channel(config.mean, config.channels, "data.mean"),
        std=per_channel(config.std, config.channels, "data.std"),
    )
    return FolderData(info, files, datasets, evaluated, partial(_build, config, seed, class_names))


def _find_splits(config: Config) -> tuple[tuple[str, ...], dict[str, Files]]:
    root = Path(config.path).expanduser()
    if not root.is_dir():
        raise UserError(f"data.path: there is no folder {root}")
    if not (root / "train").is_dir():
        raise UserError(f"data.path: {root} has no folder `train`; expected {root}/train/<class>/*.jpg")
    class_names, train = scan(root / "train")
    files = {"train": train}
    for name in ("val", "test"):
        if (root / name).is_dir():
            found, files[name] = scan(root / name)
            require_same_classes(name, found, class_names)
    if "val" not in files and config.val_fraction:
        rest, val = stratified_split(train.labels, [config.val_fraction], config.split_seed)
        if len(val):
            files["train"], files["val"] = train.select(rest), train.select(val)
    return class_names, files

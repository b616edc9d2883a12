"""Fashion-MNIST (28×28, grey, 10 classes of clothing) from its four IDX files."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from recipes.vision.arrays import build_splits
from recipes.vision.images import ImageSplits
from recipes.vision.splits import stratified_split
from trainer.errors import UserError

CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    path: str
    """Folder of `train-images-idx3-ubyte` and the other three files, with or without `.gz`."""
    augment: list[str | dict[str, Any]] = field(default_factory=list)
    """Transforms of training pictures: albumentations' own names, e.g. `- HorizontalFlip`."""
    transform: list[str | dict[str, Any]] = field(default_factory=list)
    """Transforms of pictures at evaluation."""
    image_size: Annotated[int, ">= 1"] | None = None
    """Scale pictures to this height and width, after the transforms; 28 pixels where not given."""
    channels: Literal[1, 3] = 1
    """3 repeats the grey channel, for models made for colour."""
    mean: list[float] = field(default_factory=lambda: [0.286])
    """Subtracted from pixels scaled to 0..1: one value, or one per channel."""
    std: list[float] = field(default_factory=lambda: [0.353])
    """What they are then divided by."""
    val_fraction: Annotated[float, "> 0", "< 1"] = 0.1
    """Part of the training files held out for `val`, the same of each class."""
    split_seed: Annotated[int, ">= 0", "<= 4294967295"] = 0
    """Which samples are held out; apart from the run's `seed`, so that runs share their splits."""

    def __post_init__(self) -> None:
        if min(self.std) <= 0:
            raise ValueError("std: must be above 0")


def build(config: Config, seed: int) -> ImageSplits:
    folder = Path(config.path).expanduser()
    if not folder.is_dir():
        raise UserError(f"data.path: there is no folder {folder}")
    images, labels = _read_pair(folder, "train")
    rest, val = stratified_split(labels, [config.val_fraction], config.split_seed)
    return build_splits(
        {
            "train": (images[rest], labels[rest]),
            "val": (images[val], labels[val]),
            "test": _read_pair(folder, "t10k"),
        },
        CLASS_NAMES,
        augment=config.augment,
        transform=config.transform,
        image_size=config.image_size,
        channels=config.channels,
        mean=config.mean,
        std=config.std,
        seed=seed,
    )


def _read_pair(folder: Path, prefix: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    images_path = _find(folder, f"{prefix}-images-idx3-ubyte")
    labels_path = _find(folder, f"{prefix}-labels-idx1-ubyte")
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise UserError(f"{images_path} has {len(images)} pictures, but {labels_path} {len(labels)} labels")
    if not len(labels):
        raise UserError(f"{labels_path}: has no samples")
    if labels.max() >= len(CLASS_NAMES):
        raise UserError(f"{labels_path}: has the label {labels.max()}; expected 0 to {len(CLASS_NAMES) - 1}")
    return images, labels.astype(np.int64)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise UserError(f"data.path: {folder} has neither {name} nor {name}.gz")


def read_idx(path: Path, num_dimensions: int) -> NDArray[np.uint8]:
    """Read an IDX file of bytes, gzipped or not. Raises UserError for any other content."""
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged or cut off: {error}") from error
    expected = bytes([0, 0, 8, num_dimensions])  # two zeros, the code of unsigned bytes, the number of dimensions
    if content[:4] != expected:
        found = content[:4].hex(" ") or "nothing"
        raise UserError(f"{path}: starts with {found}, an IDX file of this kind with {expected.hex(' ')}")
    header = 4 + 4 * num_dimensions
    if len(content) < header:
        raise UserError(f"{path}: cut off within its header")
    shape = np.frombuffer(content, ">u4", num_dimensions, 4).tolist()
    if len(content) - header != math.prod(shape):
        raise UserError(
            f"{path}: holds {len(content) - header} bytes of data, but its header says {math.prod(shape)} ({shape})"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)

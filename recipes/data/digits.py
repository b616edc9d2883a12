"""The 1,797 handwritten digits (8×8, grey) that scikit-learn carries, in fixed splits."""

from __future__ import annotations

import gzip
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from recipes.vision.arrays import build_splits
from recipes.vision.images import ImageSplits
from recipes.vision.splits import stratified_split
from trainer.errors import UserError


@dataclass(frozen=True)
class Config:
    augment: list[str | dict[str, Any]] = field(default_factory=list)
    """Transforms of training pictures: albumentations' own names, e.g. `- Affine: {rotate: [-10, 10]}`."""
    transform: list[str | dict[str, Any]] = field(default_factory=list)
    """Transforms of pictures at evaluation."""
    image_size: Annotated[int, ">= 1"] | None = None
    """Scale pictures to this height and width, after the transforms; 8 pixels where not given."""
    channels: Literal[1, 3] = 1
    """3 repeats the grey channel, for models made for colour."""
    mean: list[float] = field(default_factory=lambda: [0.305])
    """Subtracted from pixels scaled to 0..1: one value, or one per channel."""
    std: list[float] = field(default_factory=lambda: [0.376])
    """What they are then divided by."""
    val_fraction: Annotated[float, "> 0", "< 1"] = 0.15
    """Part held out for `val`, the same of each class."""
    test_fraction: Annotated[float, "> 0", "< 1"] = 0.15
    """Part held out for `test`, the same of each class."""
    split_seed: Annotated[int, ">= 0", "<= 4294967295"] = 0
    """Which samples are held out; apart from the run's `seed`, so that runs share their splits."""

    def __post_init__(self) -> None:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("test_fraction: val_fraction + test_fraction must leave something to train on")
        if min(self.std) <= 0:
            raise ValueError("std: must be above 0")


def build(config: Config, seed: int) -> ImageSplits:
    images, labels = _read()
    held_out = [config.val_fraction, config.test_fraction]
    parts = dict(zip(("train", "val", "test"), stratified_split(labels, held_out, config.split_seed), strict=True))
    return build_splits(
        {name: (images[part], labels[part]) for name, part in parts.items()},
        [str(digit) for digit in range(10)],
        augment=config.augment,
        transform=config.transform,
        image_size=config.image_size,
        channels=config.channels,
        mean=config.mean,
        std=config.std,
        seed=seed,
    )


def _read() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pictures [1797, 8, 8] scaled from 0..16 to 0..255, and labels."""
    # The file is found without importing scikit-learn, which takes 1.6 s of CPU.
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("data digits: they come with scikit-learn, which is not installed: pip install scikit-learn")
    path = Path(spec.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    try:
        text = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise UserError(f"data digits: {path}: {error}; reinstall scikit-learn") from error
    table = np.array(text.replace(b"\n", b",").rstrip(b",").split(b","), dtype=np.float32)
    table = table.reshape(-1, 65)
    return np.rint(table[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8), table[:, 64].astype(np.int64)

"""What a data set of pictures says about itself, and the object that holds its splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trainer.errors import UserError
from trainer.task import Data, Dataset


@dataclass(frozen=True)
class ImageInfo:
    """Facts about a data set of pictures that a model, a task or a server needs."""

    class_names: tuple[str, ...]
    """Name of each class, by its index."""
    class_counts: tuple[int, ...]
    """Training samples of each class."""
    channels: int
    height: int
    """Pixels, at evaluation; training pictures may differ where `augment` ends with another size."""
    width: int
    mean: tuple[float, ...]
    """Per channel, of pixels scaled to 0..1."""
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


class ImageData(Data, Protocol):
    """Data whose batches hold `image` [N, C, H, W] (uint8, or float where the pipeline makes it so),
    `label` [N] and `index` [N], both int64, and `bad`."""

    @property
    def info(self) -> ImageInfo: ...


class ServableImages(ImageData, Protocol):
    """Pictures that a server can be sent, too: what `trainer export` needs of a data set."""

    def preprocessing(self) -> dict[str, Any]:
        """How a picture becomes an evaluation input, see `serving.inputs.picture.Spec`."""
        ...

    def request(self, split: str, index: int) -> Any:
        """A sample of a split as a client would send it, see `serving.inputs.picture`."""
        ...


@dataclass(frozen=True)
class ImageSplits:
    """An `ImageData` made of its parts."""

    info: ImageInfo
    fingerprint: str
    splits: Mapping[str, Dataset]

    def split(self, name: str) -> Dataset | None:
        return self.splits.get(name)


def per_channel(values: Sequence[float], channels: int, key: str) -> tuple[float, ...]:
    """`values` for each channel: as they are, one for all channels, or three averaged into one for grey pictures."""
    if len(values) == channels:
        return tuple(values)
    if len(values) == 1:
        return (values[0],) * channels
    if len(values) == 3 and channels == 1:
        return (sum(values) / 3,)
    raise UserError(f"{key}: has {len(values)} values for {channels} channels; give one, or one per channel")

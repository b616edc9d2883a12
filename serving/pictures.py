"""From the bytes of a picture's file to the pixels that a model sees: the same code in training and in serving."""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Picture = NDArray[Any]
"""[height, width, channels], uint8 as decoded; float32 where a pipeline makes it so."""
MAX_PIXELS = "OPENCV_IO_MAX_IMAGE_PIXELS"
"""OpenCV's own bound on what it decodes, read from the environment when it is imported."""


class UnreadableImage(Exception):
    """A picture that cannot be used; the text says why."""


def limit_pixels(count: int) -> None:
    """Refuse pictures of more pixels than that before they are decoded. Call it before the first picture."""
    os.environ[MAX_PIXELS] = str(count)


@functools.cache
def opencv() -> ModuleType:
    """OpenCV without threads of its own: the data workers are the parallelism, and more threads fight with them."""
    import cv2

    cv2.setNumThreads(0)
    cv2.utils.logging.setLogLevel(
        cv2.utils.logging.LOG_LEVEL_SILENT
    )  # what is wrong with a file is said once, in the sample's reason
    return cv2


def decode(data: bytes, channels: int) -> Picture:
    """Pixels of an encoded picture, [height, width, channels] uint8, turned upright by its EXIF orientation.

    Grey, palette, CMYK and 16-bit pictures are converted; transparency is left out.

    Args:
        channels: 3 for RGB, 1 for grey.

    Raises:
        UnreadableImage: not a picture, damaged, or cut off.
    """
    if not data:
        raise UnreadableImage("the file is empty")
    cv2 = opencv()
    try:
        image = cv2.imdecode(
            np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB if channels == 3 else cv2.IMREAD_GRAYSCALE
        )
    except cv2.error as error:
        raise UnreadableImage(f"cannot be decoded: {error.err}") from error
    if image is None:
        raise UnreadableImage("cannot be decoded: not a picture, damaged, or cut off")
    return image if channels == 3 else image[..., None]  # type: ignore[no-any-return]


def centre_crop(image: Picture, size: tuple[int, int], fraction: float) -> Picture:
    """The largest centred rectangle of the shape of `size`, times `fraction`, scaled to `size` (height, width).

    A picture that has this size already stays as it is.
    """
    height, width = image.shape[:2]
    if (height, width) == size:
        return image
    scale = fraction * min(height / size[0], width / size[1])
    crop_height, crop_width = max(1, round(scale * size[0])), max(1, round(scale * size[1]))
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    crop = image[top : top + crop_height, left : left + crop_width]
    cv2 = opencv()
    # Averaging over the area keeps a smaller picture free of aliasing, as Pillow's resize does.
    resized = cv2.resize(crop, size[::-1], interpolation=cv2.INTER_AREA if scale > 1 else cv2.INTER_LINEAR)
    return resized if resized.ndim == 3 else resized[..., None]  # type: ignore[no-any-return]


def stretch(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale [N, C, H, W] to `size` (height, width), whatever its proportions; as it is where it has that size."""
    from torch.nn import functional as F

    if tuple(images.shape[2:]) == size or not len(images):
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True)

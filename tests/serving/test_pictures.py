from __future__ import annotations

import io
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from serving.pictures import UnreadableImage, centre_crop, decode, opencv

RED, GREEN, BLUE, YELLOW = (250, 10, 10), (10, 250, 10), (10, 10, 250), (200, 200, 10)


def quarters() -> Image.Image:
    """40×60: red and blue above, green and yellow below."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:20, :30], pixels[:20, 30:], pixels[20:, :30], pixels[20:, 30:] = RED, BLUE, GREEN, YELLOW
    return Image.fromarray(pixels)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def corners(pixels: np.ndarray) -> np.ndarray:
    return pixels[[3, 3, -4, -4], [3, -4, 3, -4]].astype(int)


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (quarters(), "JPEG"),
        (quarters().convert("CMYK"), "JPEG"),
        (quarters(), "PNG"),
        (quarters().quantize(4), "PNG"),
        (quarters().convert("RGBA"), "PNG"),
        (quarters(), "WEBP"),
        (quarters(), "BMP"),
        (quarters(), "TIFF"),
        (quarters(), "GIF"),
        (quarters(), "PPM"),
    ],
)
def test_colours(image: Image.Image, kind: str) -> None:
    pixels = decode(encode(image, kind), 3)
    assert pixels.shape == (40, 60, 3) and pixels.dtype == np.uint8
    assert np.abs(corners(pixels) - [RED, BLUE, GREEN, YELLOW]).max() <= 6


def test_grey() -> None:
    expected = np.asarray(quarters().convert("L"))[[3, 3, -4, -4], [3, -4, 3, -4]]
    for data in (encode(quarters(), "PNG"), encode(quarters().convert("L"), "PNG"), encode(quarters(), "JPEG")):
        pixels = decode(data, 1)
        assert pixels.shape == (40, 60, 1)
        assert np.abs(corners(pixels)[:, 0] - expected).max() <= 3
        colour = decode(data, 3)
        assert colour.shape == (40, 60, 3)


def test_sixteen_bits_keep_their_upper_eight() -> None:
    deep = (np.arange(40 * 60, dtype=np.uint16).reshape(40, 60) * 27).astype(np.uint16)
    _, data = cv2.imencode(".png", deep)
    assert np.abs(decode(data.tobytes(), 1)[..., 0].astype(int) - deep // 256).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_upright(kind: str, channels: int) -> None:
    exif = Image.Exif()
    exif[0x112] = 6  # taken with the camera turned: to be shown turned right by 90°
    turned = decode(encode(quarters(), kind, exif=exif), channels)
    straight = decode(encode(quarters(), kind), channels)
    assert turned.shape == (60, 40, channels)
    assert np.abs(corners(turned) - corners(np.rot90(straight, -1))).max() <= 3


def noisy(kind: str, **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels), kind, **options)


BROKEN = {
    "empty": b"",
    "text": b"<html>404 Not Found</html>" * 9,
    "JPEG, half": noisy("JPEG")[:20000],
    "JPEG, header": noisy("JPEG")[:100],
    "JPEG, without its end": noisy("JPEG")[:-2],
    "PNG, half": noisy("PNG")[:20000],
    "PNG, zeros": noisy("PNG")[:50000] + bytes(500) + noisy("PNG")[50500:],
    "WebP, half": noisy("WEBP")[:5000],
    "BMP, half": noisy("BMP")[:5000],
    "GIF, half": noisy("GIF")[:5000],
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pictures_are_refused(name: str) -> None:
    with pytest.raises(UnreadableImage):
        decode(BROKEN[name], 3)


def test_opencv_has_no_threads_of_its_own() -> None:
    assert opencv().getNumThreads() <= 1


def test_centre_crop() -> None:
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[:, 50:150] = 200
    assert (centre_crop(pixels, (32, 32), 1.0) == 200).all()  # the centred square is what was set
    assert (centre_crop(pixels, (50, 100), 1.0)[:, [0, -1]] == 0).all()
    whole, inner = centre_crop(pixels, (32, 64), 1.0), centre_crop(pixels, (32, 64), 0.5)
    assert whole.mean() == pytest.approx(100, abs=1) and (inner == 200).all()
    assert centre_crop(pixels, (100, 200), 0.5) is pixels
    grey = centre_crop(pixels[..., :1], (300, 300), 0.9)
    assert grey.shape == (300, 300, 1) and (grey == 200).all()

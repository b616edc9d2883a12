"""One picture: the bytes of its file, base64 in JSON, or its pixels as nested lists."""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from serving.errors import BadBundle, BadInput
from serving.inputs import Arrays, Encoded
from serving.inputs.tensor import numbers
from serving.pictures import Picture, UnreadableImage, centre_crop, decode, stretch
from serving.signature import Signature

SEED = 0
"""Of the transforms; they were found to give the same with any seed when the bundle was made."""


@dataclass(frozen=True)
class Spec:
    """How a picture becomes the model's input; the field `preprocessing` of a bundle, without `kind`."""

    channels: Literal[1, 3]
    height: int
    """Pixels, at the end."""
    width: int
    resize: Literal["crop", "stretch", "none"]
    """After the transforms: `centre_crop`, `stretch`, or nothing; a picture of another size is then refused."""
    fraction: float = 1.0
    """Of `centre_crop`."""
    dtype: Literal["uint8", "float32"] = "uint8"
    transform: dict[str, Any] | None = None
    """Albumentations' own serialised pipeline."""


class PictureInput:
    """Parses and prepares pictures."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._transform: Callable[..., Any] | None = None
        self._takes_any_size = spec.resize != "none" or spec.transform is not None

    def parse(self, instance: Any, where: str) -> Encoded | Arrays:
        if isinstance(instance, dict):
            return self._from_base64(instance, where)
        if not isinstance(instance, list):
            raise BadInput(where, f"expected {self._expected()}, got {_kind(instance)}")
        return (self._pixels(instance, where),)

    def parse_bytes(self, data: bytes, where: str) -> Encoded:
        if not data:
            raise BadInput(where, "is empty; expected the bytes of a picture", is_undecodable=True)
        return Encoded(data, where)

    def prepare(self, sample: Encoded | Arrays) -> Arrays:
        if isinstance(sample, Encoded):
            where = sample.where
            try:
                picture = decode(sample.data, self._spec.channels)
            except UnreadableImage as error:
                raise BadInput(where, str(error), is_undecodable=True) from error
        else:
            where, picture = "", self._with_channels(sample[0])
        return (self._view(picture, where),)

    def schema(self) -> dict[str, Any]:
        value = {"type": "integer", "minimum": 0, "maximum": 255}
        channels = {"type": "array", "items": value, "minItems": self._spec.channels, "maxItems": self._spec.channels}
        fixed = self._spec.resize == "none" and self._spec.transform is None

        def rows(pixel: dict[str, Any]) -> dict[str, Any]:
            width = {"minItems": self._spec.width, "maxItems": self._spec.width} if fixed else {"minItems": 1}
            height = {"minItems": self._spec.height, "maxItems": self._spec.height} if fixed else {"minItems": 1}
            return {"type": "array", "items": {"type": "array", "items": pixel, **width}, **height}

        encoded = {
            "type": "object",
            "properties": {"b64": {"type": "string", "format": "byte", "description": "file of a picture, base64"}},
            "required": ["b64"],
            "additionalProperties": False,
        }
        return {"oneOf": [rows(value), rows(channels), encoded]}

    def _from_base64(self, instance: dict[str, Any], where: str) -> Encoded:
        text = instance.get("b64")
        if instance.keys() != {"b64"} or not isinstance(text, str):
            raise BadInput(where, f"expected {self._expected()}, got an object with {_keys(instance)}")
        try:
            data = b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadInput(f"{where}.b64", f"is no base64 ({error})") from error
        return self.parse_bytes(data, f"{where}.b64")

    def _pixels(self, instance: list[Any], where: str) -> NDArray[np.uint8]:
        try:
            pixels = numbers(instance, "uint8")
        except (ValueError, OverflowError) as error:
            text = f"rows of different lengths; expected {self._expected()}"
            # Of a picture of any size, a JSON schema can't forbid them: no mistake of form, then.
            raise BadInput(where, text, is_undecodable=self._takes_any_size) from error
        if pixels.dtype.kind not in "iu":
            raise BadInput(where, f"holds what is no whole number; expected {self._expected()}")
        self._check_shape(pixels.shape, where)
        low, high = pixels.min(), pixels.max()
        if low < 0 or high > 255:
            raise BadInput(where, f"pixel value {low if low < 0 else high}; expected 0 to 255")
        return pixels.astype(np.uint8)

    def check_pixels(self, pixels: NDArray[Any], where: str) -> Arrays:
        """A sample out of an array [H, W] or [H, W, C], as binary protocols send them. Raises BadInput."""
        if pixels.dtype != np.uint8:
            raise BadInput(where, f"is {pixels.dtype}; pixels are uint8")
        self._check_shape(pixels.shape, where)
        return (pixels,)

    def _check_shape(self, shape: tuple[int, ...], where: str) -> None:
        spec = self._spec
        good = len(shape) in (2, 3) and min(shape) > 0 and (len(shape) == 2 or shape[2] in (1, spec.channels))
        if good and not self._takes_any_size:
            good = shape[:2] == (spec.height, spec.width)
        if not good:
            raise BadInput(where, f"shape {list(shape)}; expected {self._expected()}")

    def _expected(self) -> str:
        spec = self._spec
        size = "[height, width" if self._takes_any_size else f"[{spec.height}, {spec.width}"
        colour = f"{size}]" if spec.channels == 1 else f"{size}] or {size}, {spec.channels}]"
        return f'pixels {colour} from 0 to 255, or {{"b64": a picture\'s file}}'

    def _with_channels(self, pixels: NDArray[Any]) -> Picture:
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        return np.repeat(pixels, self._spec.channels, axis=2) if pixels.shape[2] < self._spec.channels else pixels

    def _view(self, picture: Picture, where: str) -> NDArray[Any]:
        """The model's input [C, H, W]; in memory the channels stay innermost, as in training."""
        spec, size = self._spec, (self._spec.height, self._spec.width)
        if spec.transform is not None:
            picture = self._transformed(picture, where)
        if spec.resize == "crop":
            picture = centre_crop(picture, size, spec.fraction)
        elif spec.resize == "stretch" and picture.shape[:2] != size:
            import torch

            picture = stretch(torch.from_numpy(picture[None]).permute(0, 3, 1, 2), size)[0].permute(1, 2, 0).numpy()
        if picture.shape != (*size, spec.channels) or picture.dtype != spec.dtype:
            raise BadInput(
                where,
                f"ends as {picture.dtype} {list(picture.shape)}; the model takes {spec.dtype} "
                f"{[*size, spec.channels]}, so the picture's size must be another one",
                is_undecodable=True,
            )
        return picture.transpose(2, 0, 1)

    def _transformed(self, picture: Picture, where: str) -> Picture:
        if self._transform is None:
            self._transform = _albumentations(self._spec.transform)
        try:
            result: Picture = self._transform(image=picture)["image"]
        except Exception as error:  # whatever a transform raises is about this picture: a crop larger than it, mostly
            text = str(error).partition("\n")[0] or type(error).__name__
            raise BadInput(where, f"can't be transformed: {text}", is_undecodable=True) from error
        return result if result.ndim == 3 else result[..., None]


def build(spec: Mapping[str, Any], signature: Signature) -> PictureInput:
    """Raises BadBundle for a spec that this version does not know."""
    try:
        return PictureInput(Spec(**{key: value for key, value in spec.items() if key != "kind"}))
    except TypeError as error:
        raise BadBundle(f"bundle.json: preprocessing: {error}") from error


def _albumentations(serialised: Any) -> Callable[..., Any]:
    import os

    from serving.pictures import opencv

    opencv()
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # its import asks the network for newer versions otherwise
    import albumentations

    # Finds classes by name among albumentations' own; nothing else is imported or called.
    compose = albumentations.from_dict(serialised)
    compose.set_random_seed(SEED)
    found: Callable[..., Any] = compose
    return found


def _kind(value: Any) -> str:
    names = {str: "a text", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _keys(instance: dict[str, Any]) -> str:
    return ", ".join(repr(str(key)[:40]) for key in list(instance)[:5]) or "nothing in it"

"""Pipelines of albumentations' transforms, by their own names, with randomness that belongs to the sample."""

from __future__ import annotations

import importlib
import inspect
import os
import random
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from recipes.vision.suggest import did_you_mean
from serving.pictures import Picture, UnreadableImage, opencv
from trainer.errors import UserError

Entry = str | dict[str, Any]
"""`HorizontalFlip`, or `{HorizontalFlip: {p: 0.5}}`."""

_NESTED = ("transforms", "first", "second")
_GOLDEN = 0x9E3779B97F4A7C15F39CC0605CEDC835
"""Odd, and its bits look random: times this, a 64-bit seed fills the 128 bits of PCG64's state."""
_REFUSED = {
    "ToTensorV2": "leave it out: pictures become tensors after the pipeline",
    "ToTensor3D": "leave it out: pictures become tensors after the pipeline",
    "Lambda": "takes Python functions, which a config does not hold",
}


class Pipeline:
    """Transforms in a row: a function of a picture and a seed."""

    def __init__(self, entries: Sequence[Entry], key: str) -> None:
        """Raises UserError, with `key` and position, for an unknown transform or a bad argument."""
        library = _albumentations()
        self._key = key
        self._numpy = np.random.PCG64(0)
        self._python = random.Random(0)
        steps = [_build(library, entry, f"{key}[{position}]") for position, entry in enumerate(entries)]
        self._compose = library.Compose(steps, is_check_shapes=False)
        # One pair of generators for all transforms, set anew for each sample: 12 µs, where set_random_seed takes 100.
        self._compose.set_random_state(np.random.Generator(self._numpy), self._python)

    def serialised(self) -> dict[str, Any]:
        """Plain data of which albumentations makes the same transforms."""
        found: dict[str, Any] = self._compose.to_dict()
        return found

    def __call__(self, image: Picture, seed: int) -> Picture:
        """Transform [height, width, channels]; the same image and 64-bit seed give the same result everywhere.

        Raises UnreadableImage where a transform refuses the picture, UserError for a result that is no picture.
        """
        self._numpy.state = {
            "bit_generator": "PCG64",
            "state": {"state": seed * _GOLDEN % 2**128, "inc": 1},
            "has_uint32": 0,
            "uinteger": 0,
        }
        self._python.seed(seed)
        try:
            result: Picture = self._compose(image=image)["image"]
        except Exception as error:  # whatever a transform raises is about this picture: a crop larger than it, mostly
            raise UnreadableImage(f"{self._key}: {type(error).__name__}: {_first_line(error)}") from error
        if result.ndim not in (2, 3) or result.dtype not in (np.uint8, np.float32):
            raise UserError(
                f"{self._key}: gives {result.dtype} {list(result.shape)}; "
                f"expected pixels [height, width, channels] as uint8 or float32"
            )
        return result if result.ndim == 3 else result[..., None]


def _albumentations() -> ModuleType:
    opencv()
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # its import asks the network for newer versions otherwise
    return importlib.import_module("albumentations")


def _build(library: ModuleType, entry: Any, key: str) -> Any:
    name, arguments = _parse(entry, key)
    cls = _find(library, name, key)
    key = f"{key}.{name}"
    known = [parameter for parameter in inspect.signature(cls.__init__).parameters if parameter != "self"]
    for argument in arguments:
        if argument not in known:
            raise UserError(
                f"{key}: unknown argument {argument!r}{did_you_mean(argument, known)}; there are: {', '.join(known)}"
            )
    values = {argument: _value(library, value, argument, key) for argument, value in arguments.items()}
    if "InitSchema" in vars(next(base for base in cls.__mro__ if "__init__" in vars(base))):
        values["strict"] = True  # else what its schema can't digest ends in a warning, and defaults in its place
    try:
        transform = cls(**values)
    except Exception as error:  # whatever the constructor raises is about these arguments
        raise UserError(f"{key}: {_explain(error)}") from error
    others = sorted(set(getattr(transform, "targets_as_params", ())) - {"image"})
    if others:
        raise UserError(f"{key}: needs {', '.join(others)}, which a picture alone does not have")
    return transform


def _parse(entry: Any, key: str) -> tuple[str, dict[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, dict) and len(entry) == 1:
        [(name, arguments)] = entry.items()
        if isinstance(name, str) and (arguments is None or isinstance(arguments, dict)):
            return name, arguments or {}
    raise UserError(f"{key}: expected a transform, as `Name` or `Name: {{argument: value}}`, got {entry!r}")


def _find(library: ModuleType, name: str, key: str) -> Any:
    if name in _REFUSED:
        raise UserError(f"{key}.{name}: {_REFUSED[name]}")
    bases = (library.BasicTransform, library.BaseCompose)
    found = getattr(library, name, None)
    if inspect.isclass(found) and issubclass(found, bases):
        return found
    names = [n for n, member in vars(library).items() if inspect.isclass(member) and issubclass(member, bases)]
    raise UserError(
        f"{key}: albumentations {library.__version__} has no transform {name!r}{did_you_mean(name, names)}; "
        f"they are listed at https://explore.albumentations.ai"
    )


def _value(library: ModuleType, value: Any, argument: str, key: str) -> Any:
    if argument == "transforms" and isinstance(value, list):
        return [_build(library, entry, f"{key}.transforms[{position}]") for position, entry in enumerate(value)]
    if argument in _NESTED:
        return _build(library, value, f"{key}.{argument}")
    if isinstance(value, str) and value.startswith("cv2."):
        constant = getattr(opencv(), value.removeprefix("cv2."), None)
        if not isinstance(constant, int):
            raise UserError(f"{key}.{argument}: OpenCV has no constant {value!r}")
        return constant
    return value


def _explain(error: Exception) -> str:
    """One line for what a constructor raised; pydantic's list of problems where it is the cause."""
    problems = getattr(error.__cause__ or error, "errors", None)
    if problems is None:
        return _first_line(error)
    return "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}".removeprefix(": ") for p in problems())


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__

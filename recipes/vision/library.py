"""What is the same for models of every library: classes, options, and whether the pictures fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from recipes.vision.images import ImageInfo
from recipes.vision.suggest import did_you_mean
from trainer.errors import UserError


def require_num_classes(configured: int | None, info: ImageInfo) -> None:
    """Raises UserError where the config names another number of classes than the data have."""
    if configured is not None and configured != info.num_classes:
        raise UserError(
            f"model.num_classes: is {configured}, but the data have {info.num_classes} classes; "
            f"leave it out, or set model.num_classes={info.num_classes}"
        )


def call_constructor(
    constructor: Callable[..., nn.Module], arch: str, options: Mapping[str, Any], **ours: Any
) -> nn.Module:
    """Make a model. Raises UserError for options that it refuses, or that are set elsewhere."""
    taken = sorted(set(options) & set(ours))
    if taken:
        raise UserError(f"model.options.{taken[0]}: is set by the data and the model's other fields; leave it out")
    try:
        return constructor(**ours, **options)
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, AssertionError) as error:
        if not options:
            raise
        raise UserError(f"model.options: {arch} refuses {dict(options)}: {error}") from error


def require_fit(model: nn.Module, arch: str, info: ImageInfo) -> None:
    """Raises UserError where the model cannot take pictures of this size. Computes shapes only, a few ms."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    pictures = torch.empty(2, info.channels, info.height, info.width, device="meta")
    training = model.training
    model.eval()
    try:
        logits = functional_call(model, shapes, (pictures,))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"model.arch: {arch} can't take pictures [{info.channels}, {info.height}, {info.width}]: "
            f"{str(error).partition(chr(10))[0] or type(error).__name__}; data.image_size sets another size"
        ) from error
    finally:
        model.train(training)
    assert isinstance(logits, Tensor) and logits.shape == (2, info.num_classes), f"{arch} gives other outputs"


def unknown_arch(arch: str, library: str, names: list[str]) -> UserError:
    return UserError(f"model.arch: {library} has no {arch!r}{did_you_mean(arch, names)} ({len(names)} to choose from)")

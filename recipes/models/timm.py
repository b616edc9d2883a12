"""Networks of the library timm, by their own names (`convnext_tiny`, `vit_small_patch16_224`, ...)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

from torch import nn

from recipes.vision.images import ImageInfo
from recipes.vision.library import call_constructor, require_fit, require_num_classes, unknown_arch
from recipes.vision.weights import load_weights
from trainer.errors import UserError


@dataclass(frozen=True)
class Config:
    arch: str
    """Name of the network, e.g. `convnext_tiny`; all: `python -c "import timm; print(*timm.list_models())"`"""
    num_classes: Annotated[int, ">= 1"] | None = None
    """Only checked: it is taken from the data, and another number here is an error."""
    weights: str | None = None
    """File of pretrained weights (`.safetensors`, `.pt`, `.pth`); a head for other classes is replaced."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of `timm.create_model`, e.g. `{drop_path_rate: 0.1, img_size: 96}`."""


def build(config: Config, info: ImageInfo) -> nn.Module:
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise UserError("model timm: the library timm is not installed: pip install timm") from error
    require_num_classes(config.num_classes, info)
    if not timm.is_model(config.arch):
        raise unknown_arch(config.arch, "timm", timm.list_models())
    model = call_constructor(
        partial(timm.create_model, config.arch),
        config.arch,
        config.options,
        pretrained=False,
        num_classes=info.num_classes,
        in_chans=info.channels,
    )
    require_fit(model, config.arch, info)
    if config.weights is not None:
        load_weights(model, config.weights, info.num_classes)
    return model

"""torchvision's classification networks, by their own names (`resnet50`, `efficientnet_b0`, `vit_b_16`, ...)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from torch import nn

from recipes.vision.images import ImageInfo
from recipes.vision.library import call_constructor, require_fit, require_num_classes, unknown_arch
from recipes.vision.weights import load_weights
from trainer.errors import UserError


@dataclass(frozen=True)
class Config:
    arch: str
    """Name of the network, e.g. `resnet50`; all: https://pytorch.org/vision/stable/models.html#classification"""
    num_classes: Annotated[int, ">= 1"] | None = None
    """Only checked: it is taken from the data, and another number here is an error."""
    weights: str | None = None
    """File of pretrained weights (`.safetensors`, `.pt`, `.pth`); a head for other classes is replaced."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the network's constructor, e.g. `{dropout: 0.4}` for EfficientNet."""


def build(config: Config, info: ImageInfo) -> nn.Module:
    from torchvision import models  # type: ignore[import-untyped]  # here, since it takes a second

    require_num_classes(config.num_classes, info)
    names = models.list_models(module=models)
    if config.arch not in names:
        raise unknown_arch(config.arch, "torchvision", names)
    if info.channels != 3:
        raise UserError(
            f"model: torchvision's networks take 3 channels, the data have {info.channels}; set data.channels=3"
        )
    ours: dict[str, Any] = {"num_classes": info.num_classes}
    options = dict(config.options)
    if config.arch in ("googlenet", "inception_v3"):
        # Their auxiliary heads would make the output in training a tuple of logits.
        ours["aux_logits"] = False
        options.setdefault("init_weights", config.weights is None)
    if config.arch.startswith("vit_"):
        options.setdefault("image_size", info.height)
    model = call_constructor(models.get_model_builder(config.arch), config.arch, options, **ours)
    require_fit(model, config.arch, info)
    if config.weights is not None:
        auxiliary = ("aux1.", "aux2.", "AuxLogits.") if "aux_logits" in ours else ()
        load_weights(model, config.weights, info.num_classes, ignore=auxiliary)
    return model

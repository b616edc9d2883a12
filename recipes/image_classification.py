"""Classify pictures: one label each, cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.metrics.classification import ClassificationMetrics
from recipes.vision.images import ImageData, ImageInfo
from recipes.vision.mixing import mix
from serving.signature import Field, Signature
from trainer.errors import UserError
from trainer.task import Batch, Metrics, Servable, Task


@dataclass(frozen=True)
class Config:
    label_smoothing: Annotated[float, ">= 0", "< 1"] = 0.0
    """Part of each label that is spread evenly over all classes, in training."""
    mixup: Annotated[float, ">= 0"] = 0.0
    """Alpha of mixup (pictures of a micro-batch are blended, and so are their labels); 0 is off, 0.2 is usual."""
    cutmix: Annotated[float, ">= 0"] = 0.0
    """Alpha of CutMix (a rectangle comes from another picture); 0 is off, 1.0 is usual. With mixup, one is drawn."""
    class_weights: list[float] = field(default_factory=list)
    """Weight of each class in the training loss, in the order of the classes; empty weighs all alike."""
    balance_classes: bool = False
    """Weigh classes by their rarity: samples / (classes × samples of the class)."""

    def __post_init__(self) -> None:
        if self.class_weights and self.balance_classes:
            raise ValueError("balance_classes: the weights are given by class_weights already; use one of the two")
        if any(weight < 0 for weight in self.class_weights):
            raise ValueError("class_weights: must not be negative")


class ModelComponent(Protocol):
    """The model's section of the config."""

    def build(self, info: ImageInfo) -> nn.Module: ...


class ImageClassification(Task):
    """Pictures [N, C, H, W] to logits [N, num_classes]."""

    data: ImageData

    def __init__(self, config: Config, model: nn.Module, data: ImageData) -> None:
        self.model = model
        self.data = data
        self._config = config
        self._weights = _class_weights(config, data.info)
        scale = [1 / (255 * std) for std in data.info.std]
        shift = [-mean / std for mean, std in zip(data.info.mean, data.info.std, strict=True)]
        self._scale, self._shift = torch.tensor([scale, shift])[:, None, :, None, None]
        self._rows: tuple[Any, ...] = ()

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
        """Sum of cross-entropies and the number of samples, or with class weights the sum of the labels' weights.

        Their ratio is what `torch.nn.CrossEntropyLoss` gives for the same weights and smoothing.
        """
        labels: Tensor = batch["label"]
        if not len(labels):
            return nothing(model), 0
        images = self._normalise(batch["image"])
        config = self._config
        if (config.mixup or config.cutmix) and model.training:
            images, partner, own = mix(images, config.mixup, config.cutmix)
            logits = self._logits(model, images)
            first, first_count = self._cross_entropy(logits, labels)
            second, second_count = self._cross_entropy(logits, labels[partner])
            return own * first + (1 - own) * second, own * first_count + (1 - own) * second_count
        return self._cross_entropy(self._logits(model, images), labels)

    def metrics(self, device: torch.device) -> Metrics:
        return ClassificationMetrics(self.data.info.class_names, device)

    def evaluate(self, model: nn.Module, batch: Batch, metrics: Metrics) -> None:
        assert isinstance(metrics, ClassificationMetrics)
        if len(batch["label"]):
            metrics.update(self._logits(model, self._normalise(batch["image"])), batch["label"])

    def servable(self) -> Servable:
        data: Any = self.data
        if not (hasattr(data, "preprocessing") and hasattr(data, "request")):
            raise UserError(
                f"data: {type(data).__module__} does not say how a client's picture becomes an input: give it "
                "`preprocessing` and `request`, see recipes/vision/images.py"
            )
        info, preprocessing = self.data.info, data.preprocessing()
        pixel = "0..255" if preprocessing["dtype"] == "uint8" else "as the pipeline makes it"
        shape = (-1, info.channels, info.height, info.width)
        return Servable(
            module=Served(self),
            signature=Signature(
                inputs=(Field("image", preprocessing["dtype"], shape, f"pixel value {pixel}"),),
                outputs=(Field("scores", "float32", (-1, info.num_classes), "probability"),),
                labels=info.class_names,
            ),
            preprocessing=preprocessing,
            postprocessing={"kind": "classification"},
            inputs=lambda batch: (batch["image"],),
            answer=lambda model, batch: (self._logits(model, self._normalise(batch["image"])).float().softmax(1),),
            request=data.request,
            measure=_measure,
        )

    def _normalise(self, images: Tensor) -> Tensor:
        """(x / 255 - mean) / std on the device; floating-point pictures were normalised by their pipeline."""
        if images.dtype != torch.uint8:
            return images
        # A whole row of factors, in the pictures' order of memory: one factor per channel takes 2.5 times as long
        # where the channels lie innermost.
        layout = (images.device, images.shape[1], images.shape[3], images.stride(1), images.stride(3))
        if not self._rows or self._rows[0] != layout:
            like = images[:1, :, :1]
            rows = (torch.empty_like(like, dtype=torch.float32).copy_(values) for values in (self._scale, self._shift))
            self._rows = (layout, *rows)
        _, scale, shift = self._rows
        # The default type is a half one where the weights are (`train.precision: bf16`).
        return torch.addcmul(shift, images.float(), scale).to(torch.get_default_dtype())

    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        logits = model(images)
        expected = (len(images), self.data.info.num_classes)
        if not isinstance(logits, Tensor) or logits.shape != expected:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(f"model: gives {got}; image_classification needs logits {list(expected)}")
        return logits

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        weights = self._weights
        if weights is not None and weights.device != logits.device:
            weights = self._weights = weights.to(logits.device)
        loss = F.cross_entropy(
            logits.float(), labels, weights, reduction="sum", label_smoothing=self._config.label_smoothing
        )
        return loss, len(labels) if weights is None else float(weights[labels].sum())


class Served(nn.Module):
    """Pictures [N, C, H, W] as the data set gives them, to probabilities [N, num_classes]."""

    scale: Tensor
    shift: Tensor

    def __init__(self, task: ImageClassification) -> None:
        super().__init__()
        self.model = task.model
        self.register_buffer("scale", task._scale[0, :, 0, 0, None, None].clone())
        self.register_buffer("shift", task._shift[0, :, 0, 0, None, None].clone())

    def forward(self, image: Tensor) -> Tensor:
        if image.dtype == torch.uint8:
            image = torch.addcmul(self.shift, image.float(), self.scale)
        weights = next(self.model.parameters(), self.scale)
        logits: Tensor = self.model(image.to(weights.dtype))
        return logits.float().softmax(1)


def _measure(outputs: Sequence[Tensor], batch: Batch, metrics: Metrics) -> None:
    """Logarithms of probabilities are as good as logits: both have the same softmax."""
    assert isinstance(metrics, ClassificationMetrics)
    metrics.update(outputs[0].clamp_min(torch.finfo(torch.float32).tiny).log(), batch["label"])


def build(config: Config, model: ModelComponent, data: ImageData) -> ImageClassification:
    return ImageClassification(config, model.build(data.info), data)


def nothing(model: nn.Module) -> Tensor:
    """Zero, with a graph to every trained parameter, for a batch without samples."""
    terms = [parameter.sum() * 0.0 for parameter in model.parameters() if parameter.requires_grad]
    return torch.stack([term.float() for term in terms]).sum()


def _class_weights(config: Config, info: ImageInfo) -> Tensor | None:
    weights: Sequence[float] = config.class_weights
    if config.balance_classes:
        total = sum(info.class_counts)
        weights = [total / (info.num_classes * max(count, 1)) for count in info.class_counts]
    if not weights:
        return None
    if len(weights) != info.num_classes:
        raise UserError(f"recipe.class_weights: {len(weights)} values, but the data have {info.num_classes} classes")
    return torch.tensor(weights, dtype=torch.float32)

"""Exponential moving average of weights and floating-point buffers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

_EXACT = (torch.float32, torch.float64)


class WeightAverage:
    """average ← decay × average + (1 − decay) × weights after each step (Polyak & Juditsky 1992).

    The decay is lowered in the first steps to (1 + step) / (10 + step), as TensorFlow and timm do, so that
    the average does not remember the initial weights. Averages of half-precision weights are kept in fp32, where
    1 − decay of a weight is not rounded away. Works on sharded weights: each rank averages its own part.
    """

    def __init__(self, live: Mapping[str, torch.Tensor], decay: float) -> None:
        """`live`: a model's own tensors by name, e.g. `Engine.kept()`; what is no floating-point number is left out."""
        self.decay = decay
        self._live = {name: tensor for name, tensor in live.items() if tensor.is_floating_point()}
        self.tensors = {
            name: tensor.detach().clone() if tensor.dtype in _EXACT else tensor.detach().float()
            for name, tensor in self._live.items()
        }
        # Sharded weights and whole buffers can't go through one kernel.
        kinds = {name: hasattr(tensor, "device_mesh") for name, tensor in self._live.items()}
        self._names = [[name for name in kinds if kinds[name] == kind] for kind in set(kinds.values())]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (1 for the first)."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for names in self._names:
            averages = [self.tensors[name] for name in names]
            live = [self._live[name].detach().to(self.tensors[name].dtype) for name in names]
            torch._foreach_lerp_(averages, live, weight)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Within the context the model computes with the averages."""
        kept = {name: live.detach().clone() for name, live in self._live.items()}
        self._set(self.tensors)
        try:
            yield
        finally:
            self._set(kept)

    @torch.no_grad()
    def _set(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, live in self._live.items():
            live.detach().copy_(tensors[name])

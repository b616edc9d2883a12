"""Exponential moving average of weights and floating-point buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class WeightAverage:
    """average ← decay × average + (1 − decay) × weights after each step (Polyak & Juditsky 1992).

    The decay is lowered in the first steps to (1 + step) / (10 + step), as TensorFlow and timm do, so that
    the average does not remember the initial weights. Works on sharded weights: each rank averages its own part.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._live = {name: t for name, t in model.state_dict(keep_vars=True).items() if t.is_floating_point()}
        self.tensors = {name: tensor.detach().clone() for name, tensor in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (1 for the first)."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.tensors.values()), [t.detach() for t in self._live.values()], weight)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Within the context the model computes with the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, live in self._live.items():
            kept = live.detach().clone()
            live.detach().copy_(self.tensors[name])
            self.tensors[name].copy_(kept)

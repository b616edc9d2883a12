"""Pretrained weights from a local file, with another head where the classes are others."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import UserError

log = logging.getLogger(__name__)

_WRAPPERS = ("state_dict", "model")
"""Keys under which training scripts keep the weights beside the optimizer's state."""
_NAMED = 4


def load_weights(model: nn.Module, path: str, num_classes: int, ignore: tuple[str, ...] = ()) -> None:
    """Load a `.safetensors`, `.pt` or `.pth` file of weights into `model`, in place.

    Layers with one output for each class keep their new weights where the file has other classes; a warning says so.

    Args:
        num_classes: of the model.
        ignore: beginnings of names that the file may have beside the model's.

    Raises:
        UserError: a file that cannot be read, missing or unexpected names, other shapes.
    """
    content = _unwrap(_read(Path(path).expanduser()), path)
    state = {name: tensor for name, tensor in content.items() if not name.startswith(ignore)}
    own = model.state_dict()
    others = [name for name in own if name in state and own[name].shape != state[name].shape]
    head = [name for name in others if len(own[name]) == num_classes and own[name].shape[1:] == state[name].shape[1:]]
    problems = {
        # Files from before PyTorch 0.4.1 lack this counter, and nothing is computed from it.
        "missing": sorted(n for n in set(own) - set(state) if not n.endswith(".num_batches_tracked")),
        "unexpected": sorted(set(state) - set(own)),
        "of another shape": [f"{n} {list(state[n].shape)} for {list(own[n].shape)}" for n in others if n not in head],
    }
    if any(problems.values()):
        told = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
        raise UserError(f"model.weights: {path} does not fit the model: {told}")
    if head:
        layers = ", ".join(sorted({name.rpartition(".")[0] for name in head}))
        log.warning("%s has %d classes, the data %d: %s starts anew", path, len(state[head[0]]), num_classes, layers)
    model.load_state_dict({**state, **{name: own[name] for name in head}})


def _read(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"model.weights: there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if path.suffix in (".pt", ".pth"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"model.weights: {path} holds more than tensors and is not loaded, since unpickling can run code; "
            f"save its state_dict alone"
        ) from error
    except Exception as error:  # both libraries raise many kinds for a damaged file
        raise UserError(f"model.weights: {path} cannot be read: {str(error).partition(chr(10))[0]}") from error
    raise UserError(f"model.weights: {path} should end with .safetensors, .pt or .pth")


def _unwrap(content: Any, path: str) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    items = content.items() if isinstance(content, Mapping) else ()
    if not items or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in items):
        raise UserError(f"model.weights: {path} holds no state_dict (names and tensors)")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more

"""Program files: one format a file, each with `write(graph, path)`, and what they are all made of."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.errors import TrainerError

_PRIVATE = ("stack_trace", "nn_module_stack", "from_node", "source_fn_stack", "torch_fn")
"""What torch keeps of where a node comes from: lines and paths of the machine that exported it."""


class NotHere(Exception):
    """A format that can't be made on this machine, or of this model; the text says why in one line."""


@dataclass(frozen=True)
class Program:
    """A program's file, beside others that should compute the same."""

    name: str
    """As the table has it: `pt2`, `onnx int8`, ..."""
    runtime: str
    """A module of `serving.runtimes`."""
    path: Path
    dtype: str


def graph_of(
    module: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype | None = None
) -> torch.export.ExportedProgram:
    """The module, in evaluation mode and on the CPU, as a graph that takes any batch of 1 sample or more.

    Args:
        inputs: two samples or more.
        dtype: of the weights, where another is wanted than they have.

    Raises TrainerError for what torch can't export.
    """
    # A copy: the weights of the run's own model must stay where they are, and as they are.
    module = copy.deepcopy(module).cpu().eval()
    if dtype is not None:
        model = getattr(module, "model", module)
        model.to(dtype)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    dynamic = tuple({0: torch.export.Dim("batch", min=1)} for _ in inputs)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            graph = torch.export.export(module, tuple(part.cpu() for part in inputs), dynamic_shapes=dynamic)
    except Exception as error:  # whatever torch meets is about this model
        raise TrainerError(f"the model can't be exported by torch.export: {first_line(error)}") from error
    for part in graph.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            for key in _PRIVATE:
                node.meta.pop(key, None)
    return graph


def first_line(error: BaseException) -> str:
    """What an exception says, cut to one line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__

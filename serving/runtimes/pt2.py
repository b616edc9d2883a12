"""A program exported by `torch.export`."""

from __future__ import annotations

import operator
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from serving.bundle import Bundle
from serving.errors import BadBundle
from serving.runtimes import Run
from serving.runtimes.pt2_archive import Forged, require_data


def load(path: Path, bundle: Bundle, threads: int, device: str) -> Run:
    """Raises BadBundle for a file that is no exported program, or holds more than data."""
    from torch.export.pt2_archive._package import load_pt2

    torch.set_num_threads(threads)
    try:
        require_data(path)
        # Not torch.export.load: that goes on with an older format, which is all pickles.
        (program,) = load_pt2(str(path)).exported_programs.values()
        # The guards are Python text, and the signature is checked before.
        module = _lean(program.module(check_guards=False))
    except Forged as error:
        raise BadBundle(f"{path}: {error}, which no export writes, and is not loaded") from error
    except Exception as error:  # whatever the loader meets is about this file
        text = str(error).partition("\n")[0]
        raise BadBundle(f"{path}: is no program of torch.export ({type(error).__name__}: {text})") from error
    _channels_innermost(module)
    return on_torch(module.to(device), device)


def _lean(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The program without the Python that torch.export puts around each call: flattening of nested arguments, which a
    bundle's program does not have, and a check of shapes, which the signature has had. It takes as long as a small
    model."""
    module._forward_pre_hooks.clear()
    module.graph.set_codegen(torch.fx.graph.CodeGen())
    module.recompile()
    return module


def _channels_innermost(module: torch.fx.GraphModule) -> None:
    """Bring the weights of convolutions into the order in which pictures come: oneDNN reorders them in each call
    otherwise, which takes a seventh of ResNet-18's time for one picture. Weights that anything else uses stay as they
    are: a view of them might not be possible any more."""
    convolutions = (torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding)
    uses: dict[object, list[bool]] = defaultdict(list)
    for node in module.graph.find_nodes(op="get_attr"):
        tensor = operator.attrgetter(node.target)(module)
        uses[tensor] += [user.target in convolutions and user.args[1] is node for user in node.users]
    for tensor, are_weights in uses.items():
        if isinstance(tensor, torch.Tensor) and tensor.ndim == 4 and all(are_weights):
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


def on_torch(module: torch.nn.Module, device: str) -> Run:
    """Run a module that takes tensors and gives a tensor or a tuple of them."""

    def run(inputs: list[NDArray[np.generic]]) -> list[NDArray[np.generic]]:
        with torch.inference_mode():
            tensors = [torch.from_numpy(array).to(device) for array in inputs]
            outputs = module(*tensors)
            outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
            return [output.cpu().numpy() for output in outputs]

    return run

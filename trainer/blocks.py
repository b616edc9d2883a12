"""The repeated blocks of a model: what is compiled, checkpointed and sharded one by one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from trainer.errors import UserError

_CONTAINERS = (nn.Sequential, nn.ModuleList)


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Blocks by name: the members of the model's ModuleLists and Sequentials, and Sequentials of bare layers.

    A Sequential whose members have layers of their own is a list of blocks; one of bare layers is a block. Blocks
    have parameters and are not looked into.
    """
    found: dict[str, nn.Module] = {}

    def visit(module: nn.Module, name: str) -> None:
        for child_name, child in module.named_children():
            full = f"{name}.{child_name}" if name else child_name
            if not _has_children(child):
                is_block = type(module) is nn.ModuleList
            elif type(child) is nn.ModuleList or (
                type(child) is nn.Sequential and any(_has_children(member) for member in child)
            ):
                visit(child, full)
                continue
            elif type(module) in _CONTAINERS or type(child) is nn.Sequential:
                is_block = True
            else:
                visit(child, full)
                continue
            if is_block and next(child.parameters(), None) is not None:
                found[full] = child

    visit(model, "")
    return found


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def apply_activation_checkpointing(model: nn.Module, which: str) -> list[str]:
    """Recompute the activations of `which` modules in the backward pass; returns their names.

    Args:
        which: `none`, `full` (every block) or a regular expression that a module's whole name matches.
    """
    if which == "none":
        return []
    if which == "full":
        chosen = find_blocks(model) or {"": model}
    else:
        pattern = re.compile(which)
        # A ModuleList has a name but is never called itself.
        called = {name: m for name, m in model.named_modules() if name and type(m).forward is not nn.Module.forward}
        chosen = {name: module for name, module in called.items() if pattern.fullmatch(name)}
        nested = [name for name in chosen if any(name.startswith(f"{other}.") for other in chosen)]
        chosen = {name: module for name, module in chosen.items() if name not in nested}
    if not chosen:
        blocks = ", ".join(find_blocks(model)) or "none"
        raise UserError(f"train.activation_checkpointing: no module is named {which!r}; the model's blocks: {blocks}")
    for module in chosen.values():
        module.forward = partial(
            checkpoint, module.forward, use_reentrant=False, context_fn=partial(_recompute_contexts, module)
        )
    return list(chosen)


def _recompute_contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of the forward pass and of its repetition."""
    return nullcontext(), _keep_statistics(module)


@contextmanager
def _keep_statistics(module: nn.Module) -> Iterator[None]:
    """Running statistics of a BatchNorm have moved in the forward pass; its repetition leaves them where they are."""
    norms = [part for part in module.modules() if isinstance(part, _NormBase) and part.training]
    # `data` has a version of its own: autograd takes a change of the buffer itself for a change of what it saved.
    buffers = [buffer.data for norm in norms for buffer in norm.buffers(recurse=False)]
    kept = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, kept, strict=True):
            buffer.copy_(value)


def compile_blocks(model: nn.Module) -> None:
    """Compile each block in place (names of parameters stay), or the whole model where it has none.

    Comes before `apply_activation_checkpointing`: what is recomputed is then the compiled block.
    """
    for block in find_blocks(model).values() or [model]:
        block.forward = torch.compile(block.forward)

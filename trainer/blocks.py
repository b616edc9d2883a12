"""The repeated blocks of a model: what is compiled, checkpointed and sharded one by one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
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
        chosen = {name: module for name, module in model.named_modules() if name and pattern.fullmatch(name)}
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
    """The running statistics of a BatchNorm were moved in the forward pass; its repetition must leave them alone."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in kept:
            norm.momentum, norm.num_batches_tracked = momentum, count


def compile_blocks(model: nn.Module) -> None:
    """Compile each block in place (names of parameters stay), or the whole model where it has none."""
    for block in find_blocks(model).values() or [model]:
        block.compile()

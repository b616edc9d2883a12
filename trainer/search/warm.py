"""What the trials of a search have in common, done once: in the process that forks them. No torch until `warm`."""

from __future__ import annotations

import gc
import importlib
import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainer.component import KINDS, Component
from trainer.load import load
from trainer.run import look_around

if TYPE_CHECKING:
    from trainer.config import RunConfig


def warm_up(setup: Mapping[str, Any]) -> None:
    """`warm` for the config at `setup["config"]`."""
    import torch

    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    warm(load(setup["config"], ["tune.space={}"]))


def warm(config: RunConfig) -> None:
    """Import what a trial of `config` needs, build its data, look at packages and git; nothing is computed in parallel.

    For a process that does nothing but fork afterwards: a child begins within milliseconds, with a clean state.
    """
    from trainer.assembly import preload

    importlib.import_module("trainer.fit")
    importlib.import_module("trainer.search.child")
    for kind in KINDS:
        if isinstance(component := getattr(config, kind, None), Component):
            component.module()
    if config.holdout.method not in ("given", "none"):
        importlib.import_module("sklearn.model_selection")
    preload(config)
    look_around()
    gc.collect()
    gc.freeze()  # or each child would copy all of this memory, only to tidy it up at its end

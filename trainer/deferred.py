"""Cheaper imports: one part of a package without its `__init__`, and no collection of garbage meanwhile.

`import lightning.fabric` runs `lightning/__init__.py`, which imports Lightning's Trainer and, through
torchmetrics, torchvision and transformers: 4 s of CPU that every rank, trial and restart would pay.
"""

from __future__ import annotations

import gc
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _DeferredPackage(types.ModuleType):
    """A package whose `__init__` runs when an attribute is asked for that is not an imported submodule."""

    def __getattr__(self, name: str) -> Any:
        submodule = sys.modules.get(f"{self.__name__}.{name}")
        if submodule is not None:
            return submodule
        if name.startswith("__"):
            raise AttributeError(name)
        self.__class__ = types.ModuleType  # type: ignore[assignment]  # from here on an ordinary, loaded package
        assert self.__spec__ is not None and self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def defer_init(package: str) -> None:
    """Let submodules of `package` be imported without its `__init__`, which still runs on first real use."""
    from importlib.metadata import version  # here: the command line uses this file, too, and shall not wait for it

    if package in sys.modules:
        return
    spec = importlib.util.find_spec(package)
    if spec is None:
        return
    module = _DeferredPackage(package)
    module.__spec__, module.__loader__, module.__file__ = spec, spec.loader, spec.origin
    module.__path__ = list(spec.submodule_search_locations or [])
    module.__package__ = package
    module.__version__ = version(package)  # type: ignore[attr-defined]  # asked for at import
    sys.modules[package] = module


@contextmanager
def without_import_of(package: str) -> Iterator[None]:
    """Within the context, importing `package` gives its version and no more; afterwards it is imported as ever.

    For a package that is only asked for its version. Its submodules can't be left deferred: those of torchmetrics
    can be imported in no other order than by its `__init__`.
    """
    defer_init(package)
    try:
        yield
    finally:
        if type(sys.modules.get(package)) is _DeferredPackage:
            del sys.modules[package]


@contextmanager
def uncollected() -> Iterator[None]:
    """What is imported within is never looked at by Python's garbage collector: half a million objects, no garbage.

    Takes a sixth off the CPU time of a start with torch.
    """
    loaded = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > loaded:  # else there is nothing new to keep out, only what should be collected
            gc.freeze()
        gc.enable()

"""Components: from the name in a config to a file, its `Config` (read without importing it), and the object built.

A name without a dot is a file that ships with trainer; a dotted name is a module of the user's own.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.machinery
import os
import re
import sys
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from trainer.component_source import ComponentSpec, read_build_arguments, read_config_class
from trainer.errors import UserError

__all__ = ["KINDS", "ROOT", "Component", "ComponentSpec", "available", "locate", "read_config_class", "spec"]

ROOT = Path(__file__).parent.parent
"""Folder of the package `trainer` and of its neighbours: a source tree, or site-packages."""

KINDS = {
    "recipe": "recipes",
    "model": "recipes.models",
    "data": "recipes.data",
    "optimizer": "trainer.optimizers",
    "schedule": "trainer.schedules",
    "strategy": "trainer.strategies",
    "adapter": "trainer.adapters",
    "sampler": "trainer.search.samplers",
    "scheduler": "trainer.search.schedulers",
}
"""Field of a config that names a component -> package whose files are the shipped components of this kind."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")


@dataclass(frozen=True)
class Component:
    """A named part of a run with its own options, complete with defaults, as plain data."""

    kind: str
    name: str
    options: dict[str, Any]

    def module(self) -> types.ModuleType:
        """Import the component's file. Raises UserError where another file would be imported in its place."""
        path = locate(self.kind, self.name)
        if "." in self.name and os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        module_name = self.name if "." in self.name else f"{KINDS[self.kind]}.{self.name}"
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if module_name == missing or module_name.startswith(missing + "."):
                raise UserError(_shadowed(module_name, path)) from error
            raise UserError(f"{self.kind} {self.name} needs the module {missing!r}, which is not installed") from error
        found = getattr(module, "__file__", None)
        if found is None or not path.samefile(found):
            raise UserError(_shadowed(module_name, path))
        return module

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module's `build(config, *args, **kwargs)`; `config` is None where the file has no `Config`."""
        return self.call("build", *args, **kwargs)

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call another function of the module as `build` is called. Raises UserError where it has none."""
        module = self.module()
        function = getattr(module, name, None)
        if function is None:
            raise UserError(f"{self.kind} {self.name}: {module.__file__} has no function `{name}`")
        config_class = getattr(module, "Config", None)
        config = construct(config_class, self.options) if config_class is not None else None
        return function(config, *args, **kwargs)


def available(kind: str) -> list[str]:
    """Names of the shipped components of a kind, sorted."""
    return sorted(
        path.stem for path in folder(kind).glob("*.py") if not path.stem.startswith("_") and _NAME.fullmatch(path.stem)
    )


def folder(kind: str) -> Path:
    """Where the shipped components of a kind are."""
    return ROOT.joinpath(*KINDS[kind].split("."))


def locate(kind: str, name: str) -> Path:
    """File of a component, found without importing anything. Raises UserError for an unknown name."""
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r} is no name: use a shipped {kind}, or a module of your own such as mypkg.tiny")
    if "." in name:
        return _locate_module(kind, name)
    path = folder(kind) / f"{name}.py"
    # By the folder's list: where case does not count, a file may be there under another name.
    if not name.startswith("_") and path.parent.is_dir() and path.name in os.listdir(path.parent):
        return path
    names = available(kind)
    raise UserError(
        f"unknown {kind} {name!r}{did_you_mean(name, names)}; there are: {', '.join(names) or 'none'}; "
        f"a new one would be the file {_relative(path)}, or give your own module by its dotted name"
    )


def spec(kind: str, name: str) -> ComponentSpec:
    """What a component's file says about itself. Raises UserError, or ConfigError for what cannot be read."""
    return read_config_class(locate(kind, name))


def default(kind: str, name: str) -> Component:
    """The component with all options at their defaults. Raises UserError or ConfigError as `spec` does."""
    return Component(kind, name, asdict(spec(kind, name).config_class()))


def takes(component: Component, argument: str) -> bool:
    """Whether the component's `build` takes `argument`, read from its source text.

    Raises UserError, or ConfigError, for a component that does not exist or can't be read.
    """
    arguments = read_build_arguments(locate(component.kind, component.name))
    return arguments is None or argument in arguments


def did_you_mean(word: str, words: list[str]) -> str:
    """A phrase with the nearest of `words`, or nothing."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""


def construct(cls: type, options: Mapping[str, Any]) -> Any:
    """Make a dataclass from plain data: nested dataclasses from mappings, tuples from lists."""
    hints = _hints(cls)
    return cls(**{key: _convert(hints.get(key, Any), value) for key, value in options.items()})


@cache
def _hints(cls: type) -> dict[str, Any]:
    # A component's file may import under TYPE_CHECKING what only its functions name; fields use built-ins.
    names = {field.name for field in fields(cls)}
    return {name: hint for name, hint in get_type_hints(cls).items() if name in names}


def _convert(hint: Any, value: Any) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _convert(args[0], value)
    if origin in (Union, types.UnionType):
        for arg in args:
            converted = _convert(arg, value)
            if converted is not value:
                return converted
        return value
    if isinstance(value, Mapping):
        if isinstance(hint, type) and is_dataclass(hint):
            return construct(hint, value)
        if origin is dict:
            return {key: _convert(args[1], item) for key, item in value.items()}
    if isinstance(value, list):
        if origin is list:
            return [_convert(args[0], item) for item in value]
        if origin is tuple:
            each = args[:1] * len(value) if args[-1] is ... else args
            return tuple(_convert(arg, item) for arg, item in zip(each, value, strict=True))
        if hint is tuple:
            return tuple(value)
    return value


def _locate_module(kind: str, name: str) -> Path:
    file = _find_module(name)
    if file is None:
        importlib.invalidate_caches()
        file = _find_module(name)
    if file is None or file.suffix != ".py":
        raise UserError(
            f"no module {name!r} for the {kind}: looked for {name.replace('.', '/')}.py in this folder and on sys.path"
        )
    return file


def _find_module(name: str) -> Path | None:
    search: list[str] | None = [*sys.path, os.getcwd()]
    found = None
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        if search is None:
            return None
        full = ".".join(parts[:depth])
        # By the last part alone: a dotted name would look for its parent among the imported modules.
        found = importlib.machinery.PathFinder.find_spec(parts[depth - 1], search) or _find_editable(full, search)
        if found is None:
            return None
        places = found.submodule_search_locations
        search = list(places) if places is not None else None
    return Path(found.origin) if found is not None and found.origin is not None else None


def _find_editable(name: str, search: list[str]) -> importlib.machinery.ModuleSpec | None:
    # `pip install -e` may add finders of its own to sys.meta_path.
    for finder in sys.meta_path:
        if finder is not importlib.machinery.PathFinder:
            found = finder.find_spec(name, search if "." in name else None)
            if found is not None:
                return found
    return None


def _shadowed(module_name: str, path: Path) -> str:
    top = module_name.partition(".")[0]
    other = sys.modules.get(top)
    places = [str(place) for place in getattr(other, "__path__", [])] or [str(getattr(other, "__file__", top))]
    return (
        f"{module_name} should be {path}, but Python finds another package {top!r} in {', '.join(places)}: "
        f"rename that one, or start trainer from another folder"
    )


def _relative(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)

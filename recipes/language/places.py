"""Where a file of a config is: a path, or a file inside an installed Python package."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path

from trainer.errors import UserError

PREFIX = "package:"


def resolve(place: str, key: str) -> Path:
    """The file or folder that `place` names; `key` is the dotted key of the config, for the message.

    `package:NAME/PATH` is PATH inside the installed top-level package NAME, which is found without importing it;
    anything else is a path from the current folder. Raises UserError where nothing is there.
    """
    if not place.startswith(PREFIX):
        path = Path(place).expanduser()
        if not place or not path.exists():
            raise UserError(f"{key}: {place!r} is not there; looked in {Path.cwd()}")
        return path
    name, slash, inner = place.removeprefix(PREFIX).partition("/")
    if not slash or not inner or not name.isidentifier() or ".." in Path(inner).parts or Path(inner).is_absolute():
        raise UserError(f"{key}: {place!r} is no place in a package: write package:NAME/PATH")
    # Not `importlib.util.find_spec`: a package that is imported already may have a spec of its own making.
    found = importlib.machinery.PathFinder.find_spec(name) or importlib.util.find_spec(name)
    folders = list(found.submodule_search_locations or ()) if found is not None else []
    if not folders:
        raise UserError(f"{key}: {place!r}: the package {name!r} is not installed")
    for folder in folders:
        if (path := Path(folder) / inner).exists():
            return path
    raise UserError(f"{key}: {place!r}: the package {name!r} has no {inner!r} in {folders[0]}")

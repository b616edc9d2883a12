"""`trainer doctor`: Python and the distributions we need, against what our own metadata asks for."""

from __future__ import annotations

import platform
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING

from trainer.doctor import Check, listed, ok, problem, warning

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "yaml-trainer"
NAMED = ("torch", "lightning", "numpy", "mlflow")
"""Distributions whose versions are shown also when all is well: those that others ask for first."""


def python() -> list[Check]:
    """The interpreter's version."""
    found = f"{platform.python_version()} at {sys.executable}"
    wanted = _metadata("Requires-Python")
    if wanted is None:
        return ok("python", found)
    from packaging.specifiers import SpecifierSet

    if SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        return ok("python", found)
    return problem("python", f"{found}, wanted is {wanted}", "make an environment (venv, conda) with such a Python")


def packages() -> list[Check]:
    """Every requirement of the installed metadata, with its excluded releases."""
    try:
        wanted = metadata.requires(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return warning(
            "packages", f"{DISTRIBUTION} is not installed, so what it needs is not known", "pip install -e ."
        )
    try:
        return judge(wanted or [], _version)
    except ModuleNotFoundError as error:
        if error.name != "packaging":
            raise
        return problem("packages", "packaging is missing, which compares versions", "pip install packaging")


def judge(wanted: Sequence[str], version: Callable[[str], str | None]) -> list[Check]:
    """Compare requirements (PEP 508) with what `version(name)` says is installed; those of extras are left out."""
    from packaging.requirements import Requirement

    needed = [Requirement(text) for text in wanted]
    needed = [item for item in needed if item.marker is None or item.marker.evaluate({"extra": ""})]
    wrong: list[str] = []
    install: list[str] = []
    for item in needed:
        installed = version(item.name)
        if installed is None:
            wrong.append(f"{item.name} is missing")
        elif not item.specifier.contains(installed, prereleases=True):
            wrong.append(f"{item.name} {installed}, wanted is {item.specifier}")
        else:
            continue
        install.append(shlex.quote(_without_marker(item)))
    if wrong:
        found = f"{len(wrong)} of {len(needed)} not as required: {listed(wrong)}"
        return problem("packages", found, f"pip install {' '.join(install)}")
    named = [f"{item.name} {version(item.name)}" for item in needed if _normalised(item.name) in NAMED]
    return ok("packages", f"all {len(needed)} as required: {', '.join(named)}")


def _without_marker(item: Requirement) -> str:
    extras = f"[{','.join(sorted(item.extras))}]" if item.extras else ""
    return f"{item.name}{extras}{item.specifier}"


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _metadata(key: str) -> str | None:
    try:
        return metadata.metadata(DISTRIBUTION)[key]
    except (metadata.PackageNotFoundError, KeyError):
        return None

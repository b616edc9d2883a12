"""Which packages, in which versions, serve a bundle: found by walking the imports of the code that will run.

A list kept by hand would miss a package on the day that the server begins to use it.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from serving.errors import Mistake

PACKAGE = Path(__file__).parent.parent
NOT_SERVED = ("loadtest", "rollout", "deploy")
"""Folders of `serving` that a server does not run."""
IN_THE_IMAGE = ("deploy/probe.py", "deploy/check.py", "deploy/analysis.py")
"""What is run in a server's image nevertheless."""
ONLY_WITH = {"albumentations": "transform"}
"""Package -> the field of a bundle's preprocessing without which it is never imported."""
ACCELERATOR = re.compile(r"^(nvidia-|cuda-|triton$)")
"""Packages of a CUDA build of torch. It pins them itself; the CPU's build does without."""


def requirements(
    runtime: str, preprocessing: Mapping[str, Any], postprocessing: Mapping[str, Any], gpus: int = 0
) -> tuple[str, ...]:
    """`name==version`, sorted: what is installed here of everything that serving such a bundle imports.

    Raises Mistake where the bundle's runtime itself needs a package that is not installed here.
    """
    roots: set[str] = set()
    for file in served_files(runtime, str(preprocessing["kind"]), str(postprocessing["kind"])):
        found = set(_imported(ast.parse(file.read_bytes())))
        if file.stem == runtime and (missing := sorted(name for name in found if not importlib.util.find_spec(name))):
            raise Mistake(
                f"a {runtime} bundle needs {', '.join(missing)}, which is not installed here: install it, "
                "so that its version can be pinned"
            )
        roots |= found
    roots -= {name for name, field in ONLY_WITH.items() if not preprocessing.get(field)}
    installed = _distributions()
    names = {name for root in roots for name in installed.get(root, [])}
    closed = _closure(names)
    return tuple(f"{name}=={closed[name]}" for name in sorted(closed) if gpus or not ACCELERATOR.match(name))


def served_files(runtime: str, preprocessing: str, postprocessing: str) -> list[Path]:
    """The modules of `serving` that run when such a bundle is served."""
    chosen = {"runtimes": runtime, "inputs": preprocessing, "outputs": postprocessing}
    left_out = set(NOT_SERVED) | ({"language"} if runtime != "transformers" else set())
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        path = file.relative_to(PACKAGE)
        folder = path.parts[0]
        serves = folder not in left_out and (preprocessing == "picture" or path.name != "pictures.py")
        if folder in chosen:
            serves = path.stem in ("__init__", chosen[folder])
        if serves or path.as_posix() in IN_THE_IMAGE:
            found.append(file)
    return found


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    """Module -> the distributions that bring it; reads what every package says of itself, which takes a second."""
    return importlib.metadata.packages_distributions()


def _imported(tree: ast.AST) -> Iterator[str]:
    """Top-level names of other people's packages, also those that functions import."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in (name.partition(".")[0] for name in names):
            if name not in sys.stdlib_module_names and name != "serving":
                yield name
        yield from _imported(node)


def _closure(names: set[str]) -> dict[str, str]:
    """Name -> version of these distributions and of all that they require, as far as it is installed."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: dict[str, str] = {}
    todo = [(str(canonicalize_name(name)), "") for name in sorted(names)]
    seen = set()
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another system, or an accelerator's
        found[name] = distribution.version.partition("+")[0]  # a local build (+cpu) has a name on some indexes only
        for line in distribution.requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                wanted = str(canonicalize_name(requirement.name))
                todo += [(wanted, ""), *((wanted, item) for item in sorted(requirement.extras))]
    return found

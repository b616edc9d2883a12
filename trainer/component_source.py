"""Read a component's `Config` from its source text, so that neither torch nor the component is imported.

Only the dataclass `Config`, and the top-level dataclasses it refers to, are executed, with nothing in reach but
`dataclass`, `field`, `Literal`, `Annotated` and `Any`. What needs more than that is refused with file and line.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from dataclasses import dataclass, field, make_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from trainer.errors import ConfigError, Problem

NAMESPACE: dict[str, Any] = {
    "dataclass": dataclass,
    "field": field,
    "Literal": Literal,
    "Annotated": Annotated,
    "Any": Any,
}
_FACTORIES = ("list", "dict", "tuple")


@dataclass(frozen=True)
class ComponentSpec:
    """What a component's file says about itself."""

    config_class: type
    """The dataclass `Config`; one without fields where the file has none."""
    help_by_field: dict[str, str]
    """Docstring under each field of `Config`."""
    doc: str
    """First line of the file's docstring."""


@cache
def read_config_class(path: Path) -> ComponentSpec:
    """Read a component's file. Raises ConfigError, with file and line, for what cannot be read without importing."""
    tree = _parse(path)
    doc = (ast.get_docstring(tree) or "").partition("\n")[0]
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if "Config" not in classes:
        _refuse_imported_config(tree, path)
        return ComponentSpec(make_dataclass("Config", [], frozen=True), {}, doc)
    wanted = _reachable("Config", classes)
    problems = [problem for name in wanted for problem in _Checker(path, set(classes)).check(classes[name])]
    if problems:
        raise ConfigError(problems)
    future: ast.stmt = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)
    body = [future, *(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in wanted)]
    code = compile(ast.fix_missing_locations(ast.Module(body, [])), str(path), "exec", dont_inherit=True)
    # dataclasses looks its module up by `__name__`; this one stands in for the component's.
    namespace = {**NAMESPACE, "__name__": __name__}
    config_class = classes["Config"]
    try:
        exec(code, namespace)
        for name in wanted:
            get_type_hints(namespace[name], globalns=namespace, include_extras=True)
    except Exception as error:  # any error of the component's author, to be shown with its place
        raise ConfigError([_problem(path, config_class, f"Config cannot be read: {error}")]) from error
    for name in wanted:
        namespace[name].__annotations__ = get_type_hints(namespace[name], globalns=namespace, include_extras=True)
    help_by_field = {key: text for name in wanted for key, text in _field_help(classes[name]) if name == "Config"}
    return ComponentSpec(namespace["Config"], help_by_field, doc)


@cache
def read_help(path: Path) -> dict[str, tuple[str, dict[str, str]]]:
    """Class name -> (first line of its docstring, docstring under each field), for the top-level classes of a file."""
    classes = [node for node in _parse(path).body if isinstance(node, ast.ClassDef)]
    return {
        node.name: ((ast.get_docstring(node) or "").partition("\n")[0], dict(_field_help(node))) for node in classes
    }


@cache
def read_build_arguments(path: Path) -> frozenset[str] | None:
    """Names of the arguments that the file's function `build` takes; None where it takes any, or isn't written there.

    Raises ConfigError for a file that is no Python.
    """
    for node in _parse(path).body:
        if isinstance(node, ast.FunctionDef) and node.name == "build":
            given = node.args
            named = frozenset(argument.arg for argument in (*given.args, *given.kwonlyargs))
            return None if given.kwarg is not None else named
    return None


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), str(path))
    except SyntaxError as error:
        raise ConfigError([Problem(f"Python syntax: {error.msg}", file=str(path), line=error.lineno or 0)]) from error
    except (OSError, ValueError) as error:
        raise ConfigError([Problem(f"cannot be read: {error}", file=str(path))]) from error


def _field_help(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for statement, following in zip(node.body, node.body[1:], strict=False):
        text = _text(following)
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and text:
            yield statement.target.id, " ".join(text.split())


def _text(node: ast.stmt) -> str | None:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return node.value.value
    return None


def _reachable(start: str, classes: dict[str, ast.ClassDef]) -> list[str]:
    found, queue = {start}, [start]
    while queue:
        for node in ast.walk(classes[queue.pop()]):
            if isinstance(node, ast.Name) and node.id in classes and node.id not in found:
                found.add(node.id)
                queue.append(node.id)
    return [name for name in classes if name in found]


def _refuse_imported_config(tree: ast.Module, path: Path) -> None:
    for node in tree.body:
        names: list[str] = []
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        if "Config" in names:
            raise ConfigError([_problem(path, node, "Config must be a dataclass written in this file")])


def _problem(path: Path, node: ast.AST, message: str) -> Problem:
    return Problem(message, file=str(path), line=getattr(node, "lineno", 0))


class _Checker:
    """Whether a class can be executed outside its module."""

    def __init__(self, path: Path, classes: set[str]) -> None:
        self.path = path
        self.known = classes | set(NAMESPACE) | set(dir(builtins)) | {"__class__"}

    def check(self, node: ast.ClassDef) -> Iterator[Problem]:
        if not any(_is_dataclass_decorator(decorator) for decorator in node.decorator_list):
            yield self.problem(node, f"{node.name} must be a dataclass: write @dataclass(frozen=True) above it")
        for base in node.bases:
            yield from self.names(base)
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign):
                yield from self.names(statement.annotation)
                if statement.value is not None and not _is_literal(statement.value) and not _is_field(statement.value):
                    yield self.problem(
                        statement,
                        f"{node.name}.{ast.unparse(statement.target)}: the default must be a literal or "
                        f"field(default_factory=list) or dict, since the file is read without importing it",
                    )
            elif isinstance(statement, ast.FunctionDef):
                yield from self.names(statement)
            elif _text(statement) is None and not isinstance(statement, ast.Pass):
                yield self.problem(statement, f"{node.name} may hold fields, docstrings and methods only")

    def names(self, node: ast.AST) -> Iterator[Problem]:
        bound = self.known | {
            name
            for child in ast.walk(node)
            for name in (
                [child.id]
                if isinstance(child, ast.Name) and not isinstance(child.ctx, ast.Load)
                else [child.arg]
                if isinstance(child, ast.arg)
                else [child.name]
                if isinstance(child, ast.ExceptHandler) and child.name
                else [(alias.asname or alias.name).partition(".")[0] for alias in child.names]
                if isinstance(child, ast.Import | ast.ImportFrom)
                else []
            )
        }
        for child in ast.walk(node):
            if isinstance(child, ast.Name) and child.id not in bound:
                yield self.problem(
                    child,
                    f"`{child.id}` is out of reach, since Config is read without importing the file: use built-in "
                    f"types, Literal, Annotated, Any, dataclasses of this file, or an import inside the method",
                )

    def problem(self, node: ast.AST, message: str) -> Problem:
        return _problem(self.path, node, message)


def _is_dataclass_decorator(node: ast.expr) -> bool:
    target = node.func if isinstance(node, ast.Call) else node
    return isinstance(target, ast.Name) and target.id == "dataclass"


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


def _is_field(node: ast.expr) -> bool:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "field"):
        return False
    return not node.args and all(
        _is_literal(keyword.value)
        or (isinstance(keyword.value, ast.Lambda) and _is_literal(keyword.value.body))
        or (keyword.arg == "default_factory" and isinstance(keyword.value, ast.Name))
        for keyword in node.keywords
    )

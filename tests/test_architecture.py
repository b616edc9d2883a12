"""The import graph, walked and compared with the table of ARCHITECTURE.md written as data.

A new edge is a reviewed diff.
"""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
OURS = ("trainer", "recipes", "launch", "profiling", "serving", "configs", "benchmarks", "tests")

MAY_IMPORT = {
    "recipes": {"recipes", "trainer.task", "trainer.errors", "trainer.files", "serving.signature", "serving.pictures"},
    "trainer": {"trainer", "serving.bundle", "serving.errors", "serving.signature"},
    "trainer.export": {"trainer", "serving"},
    "trainer.commands": {"trainer", "serving"},
    "serving": {"serving"},
}
"""Package -> what it may import of ours, by prefix; the longest matching package counts."""

LIGHTNING = {"trainer.engine", "trainer.strategies.ddp", "trainer.strategies.fsdp"}
"""The only modules that touch Lightning."""


def _no_torch_at_import() -> set[str]:
    """Modules of `trainer` that import without torch: all but those that pyproject.toml leaves out of coverage."""
    omitted = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["coverage"]["run"]["omit"]
    assert all((ROOT / file).is_file() for file in omitted), "pyproject.toml names modules that are gone"
    heavy = {file.removesuffix(".py").replace("/", ".") for file in omitted}
    return {m for m in _modules() if m.startswith("trainer.") and (m.count(".") == 1 or m.startswith(PARTS))} - heavy


PARTS = ("trainer.doctor.", "trainer.search.", "trainer.verify.")
"""Packages whose modules are held to the same."""
MLFLOW = "trainer.mlflow_sink"
"""The one module that imports mlflow when it is imported; only the mirror's process does that."""
HEAVY = (
    "torch",
    "torchvision",
    "lightning",
    "mlflow",
    "ray",
    "optuna",
    "plotly",
    "scipy",
    "sklearn",
    "transformers",
    "albumentations",
    "cv2",
    "timm",
    "matplotlib",
)


def _modules() -> dict[str, ast.Module]:
    files = [file for package in OURS[:-2] for file in (ROOT / package).rglob("*.py") if (ROOT / package).is_dir()]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): ast.parse(file.read_text()) for file in files}


def _imports(tree: ast.AST, top_level: bool = False) -> set[str]:
    """Dotted names that are imported; `from trainer import x` gives `trainer.x`."""
    found: set[str] = set()
    body = _run_at_import(tree) if top_level else list(ast.walk(tree))
    for node in body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _run_at_import(tree: ast.AST) -> list[ast.AST]:
    found: list[ast.AST] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        found += [node, *_run_at_import(node)]
    return found


def test_packages_import_only_what_the_table_allows() -> None:
    wrong = []
    for module, tree in _modules().items():
        package = max((name for name in MAY_IMPORT if module.startswith(name)), key=len)
        for name in _imports(tree):
            allowed = any(name == prefix or name.startswith(f"{prefix}.") for prefix in MAY_IMPORT[package])
            if name.split(".")[0] in OURS and not allowed:
                wrong.append(f"{module} imports {name}")
    assert not wrong


def test_no_import_cycles() -> None:
    modules = _modules()
    graph = {}
    for module, tree in modules.items():
        targets = set()
        for name in _imports(tree, top_level=True):
            target = name if name in modules else name.rpartition(".")[0]
            if target in modules and target != module:
                targets.add(target)
        graph[module] = targets
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())
    assert done == set(modules)


def test_only_the_floor_touches_lightning() -> None:
    touching = {m for m, tree in _modules().items() if any(n.split(".")[0] == "lightning" for n in _imports(tree))}
    assert touching == LIGHTNING


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    modules = _modules()
    for module in _no_torch_at_import() | {m for m in modules if m.startswith("trainer.commands.")}:
        heavy = {name.split(".")[0] for name in _imports(modules[module], top_level=True)} & set(HEAVY)
        heavy -= {"mlflow"} if module == MLFLOW else set()
        assert not heavy, f"{module} imports {heavy} when it is imported"


def test_files_and_functions_stay_small() -> None:
    for module, tree in _modules().items():
        length = len((ROOT / Path(*module.split("."))).with_suffix(".py").read_text().splitlines())
        assert length <= 400, f"{module} has {length} lines"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                size = (node.end_lineno or 0) - node.lineno + 1
                assert size <= 65, f"{module}.{node.name} has {size} lines"


def test_nothing_is_unpickled_and_no_shell_is_started() -> None:
    forbidden = {"pickle.load", "pickle.loads", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "os.system", "eval"}
    for module, tree in _modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in forbidden, f"{module} calls {called}"
                for keyword in node.keywords:
                    risky = (keyword.arg, ast.unparse(keyword.value))
                    assert risky not in {("shell", "True"), ("weights_only", "False")}, f"{module}: {risky}"

"""What `pip install` gives: the wheel holds what a run needs and nothing else, and works outside of the source tree."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from harness import ROOT

import trainer

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = {
    "pynvml": "GPU metrics, where it is installed",
    "timm": "the extra of this name",
    "gguf": "the extra of this name",
    "locust": "the extra `loadtest`",
    "gevent": "comes with Locust",
    "geventhttpclient": "comes with Locust",
    "onnx": "the extra of this name",
    "onnxruntime": "the extra `onnx`",
    "vllm": "language models on accelerators, where it is installed",
    "lm_eval": "`trainer evaluate --lm-eval`, where it is installed",
}
"""Modules that are imported where they are there, with a line for the user where they are missing."""
BROUGHT_BY = {"pydantic_core": "pydantic"}
"""Modules of a distribution that another one depends on in exactly one version, its own half."""


def run(line: list[str], folder: Path, **env: str) -> str:
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MLFLOW_TRACKING_URI")}
    done = subprocess.run(line, cwd=folder, env={**clean, **env}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is made from it."""
    folder = tmp_path_factory.mktemp("built")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)], folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def test_wheel_holds_the_packages_and_the_configs_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    here = [
        path.relative_to(ROOT).as_posix()
        for package, pattern in (("trainer", "*.py"), ("recipes", "*.py"), ("configs", "*.yaml"), ("serving", "*"))
        for path in (ROOT / package).rglob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    ]
    assert sorted(names) == sorted(here)


def test_sdist_holds_what_the_tests_need(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    assert (
        tests
        | {"pyproject.toml", "Makefile", "scripts/check", "README.md", "ARCHITECTURE.md", "LICENSE", "docs/config.md"}
        <= names
    )
    assert not {name for name in names if name.startswith((".ci", "runs", ".venv"))}


def test_metadata(wheel: Path) -> None:
    said = metadata(wheel)
    assert (said["Name"], said["Version"]) == ("yaml-trainer", trainer.__version__)
    assert said["License-Expression"] == "Apache-2.0" and said.get_all("License-File") == ["LICENSE"]
    with zipfile.ZipFile(wheel) as archive:
        (entry_points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "trainer = trainer.__main__:main" in archive.read(entry_points).decode()
    python = re.fullmatch(r"<3\.(\d+),>=3\.(\d+)", said["Requires-Python"])
    guard = re.search(r"\(3, (\d+)\) <= sys\.version_info\[:2\] < \(3, (\d+)\)", (ROOT / "Makefile").read_text())
    assert python and guard and python.groups() == guard.groups()[::-1], "pyproject.toml and Makefile disagree"


def test_every_dependency_has_a_lower_bound_and_no_pin() -> None:
    every = [*PROJECT["dependencies"], *(item for group in PROJECT["optional-dependencies"].values() for item in group)]
    for requirement in every:
        version = requirement.partition(";")[0]
        assert ">=" in version and "==" not in version, requirement


def test_every_import_is_declared() -> None:
    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    declared = {normal(re.split(r"[\[<>=!; ]", item)[0]) for item in PROJECT["dependencies"]}
    imported = {
        name.partition(".")[0]
        for package in ("trainer", "recipes", "serving")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_bytes()))
        for name in _imported(node)
    }
    foreign = imported - set(sys.stdlib_module_names) - {"trainer", "recipes", "serving"} - set(OPTIONAL)
    assert {"torch", "yaml"} <= foreign
    distributions = packages_distributions()
    for name in sorted(foreign):
        owners = {normal(owner) for owner in [*distributions.get(name, []), BROUGHT_BY.get(name, "")]}
        assert owners & declared, f"{name} is imported, but {owners or 'its distribution'} is not in pyproject.toml"


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []


def test_installed_wheel_trains_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    site, folder = tmp_path / "site", tmp_path / "empty"
    folder.mkdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    run([*pip, "--no-deps", "--no-index", "--target", str(site), str(wheel)], tmp_path)
    where = "import recipes, serving, trainer; print(trainer.__file__, recipes.__file__, serving.__file__)"
    found = run([sys.executable, "-c", where], folder, PYTHONPATH=str(site)).split()
    assert all(Path(file).is_relative_to(site) for file in found), found

    assert "quickstart.yaml" in run([sys.executable, "-m", "trainer", "list", "configs"], folder, PYTHONPATH=str(site))
    script = str(site / "bin" / "trainer")
    overrides = ["train.max_epochs=1", "tracking.enabled=false"]
    line = [script, "fit", "--config", "quickstart.yaml", *overrides, "--json"]
    result = json.loads(run(line, folder, PYTHONPATH=str(site)))
    assert result["steps"] == 20 and result["metrics"]["test/accuracy"] > 0.3
    assert (folder / result["run"]).is_relative_to(folder) and (folder / result["run"] / "config.yaml").is_file()
    record = json.loads((folder / result["run"] / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["versions"]["yaml-trainer"] == trainer.__version__

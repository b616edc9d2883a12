"""Help and config errors come at once: little CPU time, and nothing heavy imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import trainer

ROOT = Path(trainer.__file__).parent.parent
HEAVY = (
    "torch",
    "lightning",
    "mlflow",
    "ray",
    "optuna",
    "plotly",
    "scipy",
    "sklearn",
    "transformers",
    "albumentations",
    "pydantic",
    "numpy",
    "rich",
    "recipes",
)

# The child reports its own modules and CPU time; the time before `main`, the interpreter's start, counts too.
CHILD = """
import json, resource, sys
from trainer.__main__ import main
try:
    code = main()
finally:
    used = resource.getrusage(resource.RUSAGE_SELF)
    tops = sorted({name.partition('.')[0] for name in sys.modules})
    print(json.dumps({'code': code, 'cpu': used.ru_utime + used.ru_stime, 'modules': tops}), file=sys.stderr)
"""


def run(folder: Path, *argv: str) -> tuple[dict[str, object], str]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *argv],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    *lines, last = done.stderr.splitlines()
    return json.loads(last), done.stdout + "\n".join(lines)


def best_of(rounds: int, folder: Path, *argv: str) -> tuple[dict[str, object], str]:
    """The round with the least CPU time: another process on this machine can only add to it."""
    found = [run(folder, *argv) for _ in range(rounds)]
    return min(found, key=lambda result: float(str(result[0]["cpu"])))


def assert_light(report: dict[str, object], limit: float, allowed: tuple[str, ...] = ()) -> None:
    modules = report["modules"]
    assert isinstance(modules, list)
    assert not {name for name in HEAVY if name not in allowed} & set(modules)
    assert float(str(report["cpu"])) < limit


def test_help(tmp_path: Path) -> None:
    report, out = best_of(3, tmp_path, "--help")
    assert report["code"] == 0
    assert "check" in out
    assert_light(report, 0.3)
    modules = report["modules"]
    assert isinstance(modules, list)
    assert not {"yaml", "pydantic_core"} & set(modules), "help needs the standard library only"


@pytest.mark.parametrize("verb", ["check", "fit"])
def test_config_error(tmp_path: Path, verb: str) -> None:
    if not (Path(trainer.__file__).parent / "commands" / f"{verb}.py").exists():
        pytest.skip(f"no verb {verb} yet")
    (tmp_path / "c.yaml").write_text(
        "name: x\nrecipe: image_classification\nmodel: {name: cnn, zzz: 1}\ndata: digits\ntrain: {max_epoch: 1}\n"
    )
    report, out = best_of(3, tmp_path, verb, "--config", "c.yaml", "optimizer.lr=abc")
    assert report["code"] == 2
    for part in ("c.yaml:3: model.zzz", "c.yaml:5: train.max_epoch", "did you mean 'max_epochs'?", "optimizer.lr"):
        assert part in out
    assert_light(report, 0.6)


@pytest.mark.parametrize("verb", ["check", "tune"])
def test_error_in_a_search_space(tmp_path: Path, verb: str) -> None:
    """Each of its values is tried on the whole config: that must not cost seconds, either."""
    if not (Path(trainer.__file__).parent / "commands" / f"{verb}.py").exists():
        pytest.skip(f"no verb {verb} yet")
    entries = "".join(f"    model.{word}: {{choice: [{', '.join(map(str, range(40)))}]}}\n" for word in ("a", "b", "c"))
    (tmp_path / "c.yaml").write_text(
        "extends: quickstart\ntune:\n  space:\n    optimizer.name: {choice: [adamw, sgd]}\n"
        "    optimizer.momentum: {uniform: [0, 1], when: {optimizer.name: sgd}}\n" + entries
    )
    report, out = best_of(3, tmp_path, verb, "--config", "c.yaml")
    assert report["code"] == 2
    assert "c.yaml:5: tune.space.optimizer.momentum: with optimizer.name=sgd, optimizer.momentum=1.0" in out
    assert "c.yaml:8: tune.space.model.c: unknown key 'c'" in out
    assert_light(report, 0.9)


def test_list(tmp_path: Path) -> None:
    report, _out = run(tmp_path, "list")
    assert report["code"] == 0
    assert_light(report, 2.0, allowed=("rich",))

"""`make`: the commands that work on the source tree and make its environment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from documents import BY_MAKE, blocks, commands, shown
from harness import ROOT

TINY = "train.max_steps=4 train.device=cpu"


def clean_environment() -> dict[str, str]:
    """Without what the `make` that runs these tests hands on."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "MLFLOW_"))}


def make(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    variables = {**clean_environment(), **env}
    return subprocess.run(["make", *words], cwd=folder, env=variables, capture_output=True, text=True, timeout=240)


def test_quickstart_from_nothing_and_once_more(tmp_path: Path) -> None:
    """The environment is made for real, with the packages of this one in place of an index's."""
    for name in ("trainer", "recipes", "serving", "configs", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("Makefile", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    packages = os.pathsep.join(path for path in sys.path if path.endswith(("site-packages", "dist-packages")))
    # pip reads 0 as the value that `--no-build-isolation` sets.
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PYTHONPATH": packages}

    first = make(tmp_path, "quickstart", PYTHON=sys.executable, ARGS=TINY, **offline)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "-m venv .venv" in first.stdout and "pip install" in first.stdout
    for row in ("test/accuracy", "samples/s", "waiting for data", "run directory", "MLflow", "next"):
        assert re.search(rf"^  {row} +\S", first.stderr, re.MULTILINE), first.stderr

    second = make(tmp_path, "--dry-run", "quickstart", PYTHON=sys.executable)
    assert second.stdout.splitlines() == [".venv/bin/python -m trainer fit --config quickstart.yaml "]

    activate = ". .venv/bin/activate && trainer --version && command -v trainer"
    variables = {**clean_environment(), "PYTHONPATH": packages}
    active = subprocess.run(["bash", "-c", activate], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert active.returncode == 0, active.stderr
    assert active.stdout.splitlines()[1] == str(tmp_path / ".venv" / "bin" / "trainer")


def test_documented_targets_exist_and_make_test_runs_checks_and_tests() -> None:
    for page, lines in BY_MAKE.items():
        written = {shown(c) for block in blocks(ROOT / page) if block.language == "sh" for c in commands(block)}
        assert set(lines) <= written, f"{page} says something else by now"
    for line in {line for lines in BY_MAKE.values() for line in lines if line.startswith("make ")}:
        planned = make(ROOT, "--dry-run", *line.split()[1:])
        assert planned.returncode == 0, planned.stderr
        if "soak" in line:
            assert "TRAINER_SOAK=1 .venv/bin/python -m pytest -m soak" in planned.stdout
        if "test" in line:
            assert "scripts/check .venv/bin" in planned.stdout and "-m pytest" in planned.stdout
            assert "ARGS" not in line or planned.stdout.rstrip().endswith("-m pytest tests/trainer/test_load.py")


def test_an_old_python_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    old = tmp_path / "python3"
    pretend = "import sys; sys.version_info = (3, 10, 4); exec(sys.argv[1])"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{pretend}" "$2"\n')
    old.chmod(0o755)
    refused = make(tmp_path, "quickstart", PYTHON=str(old))
    assert refused.returncode == 2 and not (tmp_path / ".venv").exists()
    assert "Python 3.11 to 3.14 is needed" in refused.stderr and "PYTHON=python3.12" in refused.stderr


def test_a_failed_environment_is_not_taken_for_one(tmp_path: Path) -> None:
    """As on Debian without python3-venv, where a folder is left behind."""
    (tmp_path / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    half = tmp_path / "python3"
    half.write_text(
        '#!/bin/sh\n[ "$1" = -c ] && exit 0\nmkdir -p .venv\n: > .venv/pyvenv.cfg\necho no ensurepip >&2\nexit 1\n'
    )
    half.chmod(0o755)
    for _ in range(2):
        failed = make(tmp_path, "quickstart", PYTHON=str(half))
        assert failed.returncode == 2 and "no ensurepip" in failed.stderr
        assert not (tmp_path / ".venv" / "pyvenv.cfg").exists()

"""What is rendered, to the letter; the dashboard, which is the same everywhere, is left out.

`UPDATE_GOLDEN=1 python -m pytest tests/serving/test_deploy_golden.py` writes it anew; the diff is part of the review.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import yaml
from deploying import CASES, files_of
from harness import ROOT

GOLDEN = ROOT / "tests" / "golden" / "deploy"
ONE_EACH = ["docker", "compose", "kubernetes", "kserve", "argo-rollouts", "sagemaker", "vertex", "azureml", "ci"]
ELSEWHERE = ("dashboard.yaml", "serving.json")


def found_in(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_text() for file in files}


@pytest.mark.parametrize("case", ONE_EACH)
def test_golden_files(case: str) -> None:
    files = {path: text for path, text in files_of(case).items() if Path(path).name not in ELSEWHERE}
    folder = GOLDEN / case
    if os.environ.get("UPDATE_GOLDEN"):
        shutil.rmtree(folder, ignore_errors=True)
        for path, text in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
    golden = found_in(folder)
    assert sorted(files) == sorted(golden)
    for path, text in files.items():
        assert text == golden[path], f"{case}/{path}"


@pytest.mark.parametrize("case", CASES)
def test_a_rendering_is_a_function_of_its_arguments(case: str) -> None:
    assert files_of(case) == files_of(case)


@pytest.mark.parametrize("case", CASES)
def test_every_file_ends_well_and_says_what_it_is(case: str) -> None:
    for path, text in files_of(case).items():
        assert text.endswith("\n") and not text.endswith("\n\n"), path
        assert "\t" not in text and not any(line.endswith(" ") for line in text.splitlines()), path
        if path.endswith((".yaml", ".yml")):
            assert text.startswith("# "), f"{path} has no comment on top"
            list(yaml.safe_load_all(text))


def test_every_target_has_a_golden_case() -> None:
    from serving.deploy.command import TARGETS

    assert {CASES[case][0] for case in ONE_EACH} == set(TARGETS)

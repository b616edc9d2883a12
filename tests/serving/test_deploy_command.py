"""`trainer deploy render`: what it writes, what it prints, what it refuses."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from deploying import paper_bundle
from harness import environment

from serving.bundle import Bundle
from serving.deploy import command, facts
from serving.deploy.options import Options, check
from serving.errors import BadBundle, Mistake


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    capacity = {"hpa_target_in_flight": 17, "machine": "a machine"}
    return paper_bundle(tmp_path_factory.mktemp("bundles") / "doubled", {"capacity": capacity})


def render(*words: str) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    command.configure(parser)
    parser.add_argument("--json", action="store_true")
    return command.run(parser.parse_args(words))


def test_it_writes_what_it_prints(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert render(str(bundle.path), "--target", "kubernetes", "--dry-run", "--json") == 0
    printed = json.loads(capsys.readouterr().out)["files"]
    assert not any(tmp_path.iterdir())
    assert render(str(bundle.path), "--target", "kubernetes", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["output"] == "deploy/kubernetes" and told["image"] == f"doubled-numbers:{bundle.version}"
    written = {path: (tmp_path / "deploy/kubernetes" / path).read_text() for path in told["files"]}
    assert written == printed
    assert "averageValue: '17'" in written["hpa.yaml"] and "a machine" in written["hpa.yaml"]


def test_it_prints_for_people(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert render(str(bundle.path), "--target", "docker", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "==> Dockerfile <==" in printed and "==> requirements.txt <==" in printed


def test_it_does_not_write_over_files_unasked(bundle: Bundle, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = [str(bundle.path), "--target", "docker", "--output", str(output)]
    assert render(*words) == 0
    (output / "Dockerfile").write_text("mine\n")
    (output / "notes.txt").write_text("mine\n")
    (output / "bundle" / "left over").write_text("of another bundle\n")
    with pytest.raises(Mistake, match=r"\.dockerignore is there already and 2 more"):
        render(*words)
    assert (output / "Dockerfile").read_text() == "mine\n"
    assert render(*words, "--force") == 0
    assert (output / "Dockerfile").read_text() != "mine\n" and (output / "notes.txt").read_text() == "mine\n"
    assert not (output / "bundle" / "left over").exists()
    Bundle.read(output / "bundle").verify()


def test_a_changed_bundle_is_not_put_into_an_image(bundle: Bundle, tmp_path: Path) -> None:
    copy = paper_bundle(tmp_path / "copy")
    (copy.path / "program.pt2").write_bytes(b"another")
    with pytest.raises(BadBundle, match=r"program\.pt2"):
        render(str(copy.path), "--target", "docker", "--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_damaged_measurements_are_told(tmp_path: Path) -> None:
    copy = paper_bundle(tmp_path / "copy", {"capacity": {}})
    assert facts.read(copy).in_flight is None
    (copy.path / "measurements.json").write_text("{")
    with pytest.raises(BadBundle, match=r"measurements\.json can't be read"):
        facts.read(copy)


@pytest.mark.parametrize(
    ("chosen", "text"),
    [
        ({"replicas": 0}, "--replicas: at least 1"),
        ({"replicas": 5, "max_replicas": 3}, "--max-replicas: 3 is fewer than --replicas 5"),
        ({"port": 80}, "--port: 1024 to 65535"),
        ({"memory": "2 GB"}, "--memory: a number with Mi or Gi"),
        ({"max_errors": 1.5}, "--max-errors: a share"),
        ({"p95_ms": 0.0}, "--p95-ms: more than 0"),
        ({"image": "a b"}, "--image: 'a b' is no name"),
        ({"image": "x\nRUN evil"}, "is no name of an image"),
        ({"host": "a/b"}, "--host: 'a/b' is no host name"),
    ],
)
def test_options_that_can_not_be_are_refused(chosen: dict[str, Any], text: str) -> None:
    with pytest.raises(Mistake, match=text):
        check(Options(**{"image": "x:1", **chosen}))


def test_memory_and_time_to_start_follow_from_the_bundle() -> None:
    import dataclasses

    from deploying import FACTS

    large = dataclasses.replace(FACTS, size=3 << 30, runtime="transformers")
    assert (FACTS.memory(1), FACTS.memory(4), large.memory(1)) == ("2Gi", "4Gi", "8Gi")
    assert (FACTS.starts_within, large.starts_within) == (300, 600)


def test_a_pipeline_wants_a_registry(bundle: Bundle) -> None:
    with pytest.raises(Mistake, match="REGISTRY/NAME:TAG"):
        render(str(bundle.path), "--target", "ci", "--dry-run")


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("digits", "digits"),
        ("My_Model.v2", "my-model-v2"),
        ("50-classes", "model-50-classes"),
        ("x" * 80, "x" * 40),
        ("a" * 39 + "-b", "a" * 39),
    ],
)
def test_names_as_dns_allows_them(name: str, label: str) -> None:
    import dataclasses

    from deploying import FACTS

    assert dataclasses.replace(FACTS, name=name).label == label


def test_a_name_that_would_break_out_of_a_file_is_refused(tmp_path: Path) -> None:
    import dataclasses

    bundle = dataclasses.replace(paper_bundle(tmp_path / "b"), name='x"\nRUN evil')
    with pytest.raises(BadBundle, match="can't stand in files"):
        facts.read(bundle)


def test_help_needs_no_heavy_package() -> None:
    code = (
        "import argparse, sys\nfrom serving.deploy import command\n"
        "command.configure(argparse.ArgumentParser())\n"
        "print(sorted({'torch', 'numpy', 'yaml', 'packaging'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr

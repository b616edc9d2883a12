"""A bundle appears whole or not at all: refusals, failures, a full disk, Ctrl-C, two at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import exported_runs
import pytest
from disks import fill, small_disk
from harness import environment, toy_config
from outcome import only_run

from serving.bundle import Bundle
from trainer.cli import main
from trainer.errors import TrainerError, UserError
from trainer.export import measure
from trainer.export.folder import published

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    assert main(["fit", "--config", str(toy_config(folder))]) == 0
    return only_run(folder)


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SECONDS", 0.0)


def _export(run: Path, output: Path, *options: str) -> int:
    return main(["export", str(run), "--output", str(output), "--format", "pt2", *options])


def test_what_is_there_is_replaced_by_force_alone_and_only_a_bundle(run: Path, tmp_path: Path, capsys: Capture) -> None:
    output = tmp_path / "b"
    assert _export(run, output) == 0
    first = Bundle.read(output)
    assert _export(run, output, "--golden", "4") == 2
    assert "is there already; name another folder, or replace it with --force" in capsys.readouterr().err
    assert _export(run, output, "--golden", "4", "--force") == 0
    assert Bundle.read(output).golden.count == 4 and first.golden.count == 32
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert _export(run, tmp_path / "mine", "--force") == 2
    assert "is no bundle, so --force does not replace it" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "mine"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--format", "safetensors"], "is the folder of a language model"),
        (["--checkpoint", "999"], "--checkpoint: there is none of step 999"),
        (["--checkpoint", "latest"], "--checkpoint: best, newest or a step is wanted"),
        (["--golden", "0"], "--golden: must be above 0"),
        (["--price", "nan"], "--price: must be above 0"),
        (["--name", "a/b"], "--name: 'a/b': letters, digits"),
        (["--adapters"], "--adapters, --into: are for language models"),
    ],
)
def test_refusals_are_one_line(options: list[str], told: str, run: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["export", str(run), "--output", str(tmp_path / "b"), *options]) == 2
    error = capsys.readouterr().err
    assert told in error and len([line for line in error.splitlines() if line.startswith("trainer:")]) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_random_transform_is_refused(tmp_path: Path, capsys: Capture) -> None:
    transform = [{"Affine": {"rotate": [-20, 20], "p": 1.0}}]
    run = exported_runs.digits(tmp_path, data={"transform": transform}, train={"max_epochs": 1})
    assert _export(run, tmp_path / "b") == 2
    assert "data.transform: is random" in capsys.readouterr().err
    assert not list(tmp_path.glob("*b*/"))


def test_a_task_that_does_not_say_how_it_is_served(tmp_path: Path, capsys: Capture) -> None:
    config = toy_config(tmp_path, name="silent", recipe={"name": "toy.silent_recipe"})
    assert main(["fit", "--config", str(config)]) == 0
    assert _export(only_run(tmp_path, "silent"), tmp_path / "b") == 2
    assert "does not say how it is served: give its task a method `servable`" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing(run: Path, tmp_path: Path, capsys: Capture) -> None:
    with small_disk(tmp_path / "disk", "256k") as disk:
        filler = fill(disk, leave=16 << 10)
        assert _export(run, disk / "b") == 1
        error = capsys.readouterr().err
        assert "could not be written" in error and "free space" in error and "--debug" not in error
        assert list(disk.iterdir()) == [filler]


def test_ctrl_c_leaves_nothing(run: Path, tmp_path: Path) -> None:
    """In the middle of the work, when files are there already."""
    command = [sys.executable, "-m", "trainer", "export", str(run), "--output", str(tmp_path / "b"), "--format", "pt2"]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        end = time.monotonic() + 120
        while not list(tmp_path.glob(".b.*/golden.jsonl")):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "interrupted" in error
    assert list(tmp_path.iterdir()) == []


def test_two_at_once(tmp_path: Path) -> None:
    """Without force one wins and the other says so; with force both are whole, and one of them stays."""

    def write(number: int, force: bool) -> str:
        try:
            with published(tmp_path / "b", force) as folder:
                (folder / "bundle.json").write_text(json.dumps(number))
                (folder / "other").write_text(str(number))
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(lambda number: write(number, False), range(8)))
        assert sorted(bool(text) for text in told) == [False] + [True] * 7
        assert all("is there already" in text for text in told if text)
        assert not any(pool.map(lambda number: write(number, True), range(100)))
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert (tmp_path / "b" / "bundle.json").read_text() == (tmp_path / "b" / "other").read_text()


def test_a_folder_that_cant_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainerError, match="could not be written"), published(tmp_path / "file" / "b", False):
        pass

"""Checkpoints written beside the training: what was copied is what is read, and errors are not lost."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from harness import toy_config
from outcome import assert_same_bits, only_run, record
from torch import nn

from trainer import checkpoint, saving, state
from trainer.checkpoint import Manifest
from trainer.cli import main
from trainer.component import Component
from trainer.config import Checkpoint, Train
from trainer.ema import WeightAverage
from trainer.engine import Engine
from trainer.saving import Saver
from trainer.state import Progress
from trainer.world import World


@pytest.fixture
def engine() -> Engine:
    made = Engine(Component("strategy", "single", {}), Train(device="cpu", max_steps=1), World())
    made.setup(nn.Linear(400, 400), lambda model: [torch.optim.AdamW(model.parameters(), fused=True)])
    made.model(torch.ones(1, 400)).sum().backward()
    made.step()
    return made


def test_what_is_written_is_the_state_of_the_moment_of_the_save(engine: Engine, tmp_path: Path) -> None:
    saver, average = Saver(tmp_path, Checkpoint(keep=9), engine), WeightAverage(engine.bare, 0.9)
    expected = []
    for step in range(1, 5):
        captured = state.capture(engine, average, Progress(step, 10 * step))
        expected.append({name: t.clone() for name, t in [*captured.model.items(), *captured.optimizer.items()]})
        saver.save(captured, Manifest(step, 10 * step, 1, False, {}))
        with torch.no_grad():  # at once, while the other thread writes
            for tensor in [*captured.model.values(), *captured.optimizer.values(), *average.tensors.values()]:
                tensor.add_(1)
    saver.wait()
    assert [path.name for path in checkpoint.present(tmp_path)] == [checkpoint.folder_name(s) for s in range(1, 5)]
    for path, wanted in zip(checkpoint.present(tmp_path), expected, strict=True):
        found = checkpoint.read(path)
        checkpoint.verify(found)
        loaded = saving.load(found.path, found.manifest)
        got = {**loaded.model, **loaded.optimizer}
        assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_an_error_of_the_writing_thread_is_raised_by_the_next_call(engine: Engine, tmp_path: Path) -> None:
    saver = Saver(tmp_path, Checkpoint(), engine)
    checkpoint.unfinished_folder(tmp_path, 1).write_text("in the way")
    saver.save(state.capture(engine, None, Progress(1, 1)), Manifest(1, 1, 1, False, {}))
    with pytest.raises(FileExistsError):
        saver.wait()
    saver.wait()  # told once
    saver.save(state.capture(engine, None, Progress(2, 2)), Manifest(2, 2, 1, False, {}))
    saver.wait()
    assert [path.name for path in checkpoint.present(tmp_path)] == ["step-00000002"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_the_run_in_one_line_and_costs_no_checkpoint(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = {"model": {"name": "toy.net", "width": 150}, "checkpoint": {"every_steps": 3, "keep": 2}}
    assert main(["fit", "--config", str(toy_config(tmp_path, **sections))]) == 0
    filler = small_disk / "filler"
    filler.write_bytes(bytes(3_700_000))  # one checkpoint fits in, two do not
    capsys.readouterr()
    assert main(["fit", "--config", str(toy_config(small_disk, **sections))]) == 1
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("trainer: ")]
    assert "No space left on device" in line
    run = only_run(small_disk)
    assert record(run)["status"] == "failed" and "No space left" in record(run)["exit_reason"]
    filler.unlink()
    assert main(["fit", "--resume", str(run)]) == 0
    assert "going on from step-" in capsys.readouterr().err
    assert_same_bits(run, only_run(tmp_path))

"""Checkpoints written beside the training: what was copied is what is read, and errors are not lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from trainer import checkpoint, saving, state
from trainer.checkpoint import DamagedCheckpoint, Manifest
from trainer.component import Component
from trainer.config import Checkpoint, Train
from trainer.ema import WeightAverage
from trainer.engine import Engine
from trainer.errors import TrainerError
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
    saver, average = Saver(tmp_path, Checkpoint(keep=9), engine), WeightAverage(engine.kept(), 0.9)
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
    with pytest.raises(TrainerError, match=r"step-00000001 could not be written \(File exists: .unfinished-step-"):
        saver.wait()
    saver.wait()  # told once
    saver.save(state.capture(engine, None, Progress(2, 2)), Manifest(2, 2, 1, False, {}))
    saver.wait()
    assert [path.name for path in checkpoint.present(tmp_path)] == ["step-00000002"]


def test_retention_keeps_an_older_one_where_the_disk_has_spoilt_the_newest(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that flips a bit of what it was given, between the save and the removal of the one before."""
    said: list[str] = []
    saver = Saver(tmp_path, Checkpoint(keep=1), engine, said.append)

    def save(step: int) -> list[str]:
        saver.save(state.capture(engine, None, Progress(step, 10 * step)), Manifest(step, 10 * step, 1, False, {}))
        saver.wait()
        return [path.name for path in checkpoint.present(tmp_path)]

    def spoilt(unfinished: Path, manifest: Manifest) -> Path:
        final = publish(unfinished, manifest)
        data = bytearray((final / "model.safetensors").read_bytes())
        data[-3] ^= 16
        (final / "model.safetensors").write_bytes(data)
        return final

    publish = checkpoint.publish
    assert save(1) == ["step-00000001"] and said == []
    monkeypatch.setattr(checkpoint, "publish", spoilt)
    for step in (2, 3):
        assert save(step) == ["step-00000001"], "the only good one"
    assert [line.partition(" (")[0] for line in said] == ["step-00000002 is damaged", "step-00000003 is damaged"]
    monkeypatch.undo()
    assert save(4) == ["step-00000004"] and len(said) == 2


@pytest.mark.parametrize("numbers", ["{}", "[]", "null", '{"progress": {"step": 1, "consumed": 1}, "world_size": 1}'])
def test_numbers_of_another_checkpoint_are_refused_also_with_a_right_hash(
    numbers: str, engine: Engine, tmp_path: Path
) -> None:
    saver = Saver(tmp_path, Checkpoint(), engine)
    saver.save(state.capture(engine, None, Progress(2, 20)), Manifest(2, 20, 1, False, {}))
    saver.wait()
    (path,) = checkpoint.present(tmp_path)
    found = checkpoint.read(path)
    assert saving.load(path, found.manifest).numbers["progress"]["step"] == 2
    (path / "state.json").write_text(numbers)
    with pytest.raises(DamagedCheckpoint, match="step-00000002 is damaged"):
        saving.load(path, found.manifest)
    # A file that says it is safetensors and is not.
    (path / "state.json").write_text(json.dumps({**engine_numbers(2), "world_size": 1}))
    (path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(DamagedCheckpoint, match="step-00000002 is damaged"):
        saving.load(path, found.manifest)


def engine_numbers(step: int) -> dict[str, object]:
    return {"progress": {"step": step, "consumed": 10 * step, "best": None}, "optimizer": {}, "scaler": {}}


def test_an_error_is_known_without_waiting(engine: Engine, tmp_path: Path) -> None:
    saver = Saver(tmp_path, Checkpoint(), engine)
    saver.check()
    checkpoint.unfinished_folder(tmp_path, 1).write_text("in the way")
    saver.save(state.capture(engine, None, Progress(1, 1)), Manifest(1, 1, 1, False, {}))
    saver.settle()
    with pytest.raises(TrainerError, match="step-00000001 could not be written"):
        saver.check()
    saver.check()

"""Checkpoints in shards, read by one process; nothing in them is unpickled but a table of known classes."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import ROOT, toy_config
from outcome import losses, only_run, record, state
from processes import ForkServer
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from trainer import checkpoint, saving
from trainer.checkpoint import DamagedCheckpoint
from trainer.cli import main


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> Path:
    """A run of two processes under fsdp, stopped in the middle."""
    folder = tmp_path_factory.mktemp("sharded")
    config = toy_config(folder, strategy={"name": "fsdp"}, train={"ema_decay": 0.9, "max_epochs": 2})
    training = server.run("fit", "--config", str(config), "train.max_steps=6", cwd=folder, processes=2)
    assert training.wait() == [0, 0], training.log()
    return only_run(folder)


@pytest.fixture
def run(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "run"))


def rewrite(file: Path, data: bytes) -> None:
    """Replace a file of a checkpoint together with its hash, as somebody would who means harm."""
    file.write_bytes(data)
    manifest = file.parents[1] / "manifest.json"
    raw = json.loads(manifest.read_text())
    raw["files"][f"sharded/{file.name}"] = checkpoint.entry(file)
    manifest.write_bytes(checkpoint.sealed(raw))


class Harm:
    """Makes the file `harm` when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.target = str(folder / "harm")

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (self.target,)


def test_whole_tensors_are_read_without_any_process_group(run: Path, recwarn: pytest.WarningsRecorder) -> None:
    (path,) = checkpoint.present(run / "checkpoints")
    found = checkpoint.read(path)
    checkpoint.verify(found)
    assert found.manifest.sharded and found.manifest.world_size == 2
    shards = [name for name in found.manifest.files if name.endswith(".distcp")]
    assert len(shards) == 2 and "sharded/.metadata" in found.manifest.files
    loaded = saving.load(path, found.manifest)
    assert loaded.model["0.weight"].shape == (32, 8) and type(loaded.model["0.weight"]) is torch.Tensor
    assert loaded.optimizer["0.weight/exp_avg"].shape == (32, 8) and loaded.ema.keys() == loaded.model.keys()
    assert float(loaded.model["0.weight"].abs().sum()) > 0
    assert not torch.equal(loaded.ema["2.bias"], loaded.model["2.bias"])
    assert not [str(warning.message) for warning in recwarn if "single process" in str(warning.message)]


def test_one_process_goes_on(run: Path) -> None:
    assert main(["fit", "--resume", str(run), "train.max_steps=null", "strategy=auto", "data.batch_size=20"]) == 0
    assert record(run)["status"] == "finished" and len(losses(run)) == 10


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", ".metadata"])
def test_a_flipped_bit_in_any_shard_is_found(name: str, run: Path) -> None:
    (path,) = checkpoint.present(run / "checkpoints")
    data = bytearray((path / "sharded" / name).read_bytes())
    data[len(data) // 3] ^= 4
    (path / "sharded" / name).write_bytes(data)
    with pytest.raises(DamagedCheckpoint, match=rf"step-00000006 is damaged \(sharded/{name}: its sha256 differs\)"):
        checkpoint.verify(checkpoint.read(path))


@pytest.mark.parametrize("how", ["whole", "within"])
def test_a_table_that_would_call_anything_is_refused(
    how: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = checkpoint.present(run / "checkpoints")
    table: Any = Harm(tmp_path)
    if how == "within":
        table = pickle.loads((path / "sharded" / ".metadata").read_bytes())
        table.planner_data = Harm(tmp_path)
    rewrite(path / "sharded" / ".metadata", pickle.dumps(table))
    assert main(["fit", "--resume", str(run), "strategy=auto", "train.max_steps=9", "data.batch_size=20"]) == 1
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("trainer: ")]
    assert "table of contents of a sharded checkpoint names" in line and "mkdir: refused" in line
    assert not (tmp_path / "harm").exists()


def test_an_entry_that_is_no_tensor_is_refused(run: Path) -> None:
    (path,) = checkpoint.present(run / "checkpoints")
    table = pickle.loads((path / "sharded" / ".metadata").read_bytes())
    table.state_dict_metadata["model/extra"] = BytesStorageMetadata()
    rewrite(path / "sharded" / ".metadata", pickle.dumps(table))
    found = checkpoint.read(path)
    with pytest.raises(DamagedCheckpoint, match="model/extra is no tensor: refused"):
        saving.load(path, found.manifest)


def test_shards_that_would_call_anything_are_not_unpickled(run: Path, tmp_path: Path) -> None:
    (path,) = checkpoint.present(run / "checkpoints")
    table = pickle.loads((path / "sharded" / ".metadata").read_bytes())
    for name in ("__0_0.distcp", "__1_0.distcp"):
        torch.save(Harm(tmp_path), path / "sharded" / name)
        data = (path / "sharded" / name).read_bytes()
        for index, place in table.storage_data.items():
            if place.relative_path == name:
                table.storage_data[index] = type(place)(name, 0, len(data))
        rewrite(path / "sharded" / name, data)
    rewrite(path / "sharded" / ".metadata", pickle.dumps(table))
    found = checkpoint.read(path)
    checkpoint.verify(found)
    with pytest.raises(DamagedCheckpoint, match=r"could not be read .*Weights only load failed"):
        saving.load(path, found.manifest)
    assert not (tmp_path / "harm").exists()


def test_a_damaged_sharded_checkpoint_gives_way_to_the_one_before_it_on_all_ranks(
    run: Path, tmp_path: Path, server: ForkServer
) -> None:
    more = server.run("fit", "--resume", str(run), "train.max_steps=8", cwd=tmp_path, processes=2)
    assert more.wait() == [0, 0], more.log()
    (run / "checkpoints" / "step-00000008" / "sharded" / "__1_0.distcp").write_bytes(b"")
    again = server.run("fit", "--resume", str(run), "train.max_steps=null", cwd=tmp_path, processes=2)
    assert again.wait() == [0, 0], again.log()
    assert "step-00000008 is damaged" in again.log() and "going on from step-00000006" in again.log()
    assert "damaged" not in again.log(1)
    assert len(losses(run)) == 10


def test_shards_of_two_ranks_go_on_with_three_and_then_with_one_optimizer_and_average_too(
    run: Path, tmp_path: Path, server: ForkServer
) -> None:
    steady = Path(shutil.copytree(run, tmp_path / "steady"))
    reference = server.start("fit", "--resume", str(steady), "train.max_steps=10", cwd=tmp_path, processes=2)
    for processes, strategy, last in ((3, "fsdp", 8), (1, "auto", 9), (3, "fsdp", 10)):
        overrides = [f"strategy={strategy}", f"train.max_steps={last}"]
        phase = server.run("fit", "--resume", str(run), *overrides, cwd=tmp_path, processes=processes)
        assert phase.wait() == [0] * processes, phase.log()
    assert reference.wait() == [0, 0], reference.log()
    kinds = [checkpoint.read(path).manifest for path in checkpoint.present(run / "checkpoints")]
    assert [(m.step, m.world_size, m.sharded) for m in kinds] == [(8, 3, True), (9, 1, False), (10, 3, True)]
    assert {m.global_batch for m in kinds} == {20}
    tensors, wanted = state(run)[0], state(steady)[0]
    groups = {name.split("/")[0] for name in wanted if not name.startswith("random/")}
    assert groups == {"model", "optimizer", "ema"}
    for name in (name for name in wanted if not name.startswith("random/")):
        difference = (tensors[name].double() - wanted[name].double()).abs().max()
        assert difference <= 1e-5 * max(1e-3, float(wanted[name].double().abs().max())), name
    assert losses(run) == pytest.approx(losses(steady), rel=1e-5) and len(losses(run)) == 10


def test_nothing_in_the_package_unpickles() -> None:
    """No call that could run what a file says: pickle's loaders, torch.load without weights_only, numpy's pickles."""
    found = []
    for file in sorted((ROOT / "trainer").rglob("*.py")) + sorted((ROOT / "recipes").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute | ast.Name):
                continue
            name, options = ast.unparse(node.func), {item.arg: ast.unparse(item.value) for item in node.keywords}
            loads = name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "marshal.loads")
            unsafe = name.endswith("torch.load") and options.get("weights_only") != "True"
            if loads or unsafe or options.get("allow_pickle") == "True" or name == "yaml.load":
                found.append(f"{file.relative_to(ROOT)}:{node.lineno} {name}")
    assert found == []
    text = (ROOT / "trainer" / "sharded.py").read_text()
    assert text.count("Unpickler") == 3 and "class _TableUnpickler(pickle.Unpickler)" in text  # the one exception

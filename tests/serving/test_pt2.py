"""A program of torch.export is data: a forged file is refused before torch's loader runs what it asks for."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from serving.errors import BadBundle
from serving.runtimes import Run, pt2
from serving.runtimes.pt2_archive import Forged, require_data


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layer(x).softmax(1), x.reshape(x.shape[0] * 3)


class Touch:
    """Its pickle makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "program.pt2"
    graph = torch.export.export(Net(), (torch.ones(2, 3),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.export.save(graph, path)
    return path


def _forge(program: Path, path: Path, change: Callable[[str, bytes], bytes], extra: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(program) as source, zipfile.ZipFile(path, "w") as target:
        root = source.namelist()[0].partition("/")[0]
        for name in source.namelist():
            target.writestr(name, change(name.removeprefix(f"{root}/"), source.read(name)))
        for name, data in extra.items():
            target.writestr(f"{root}/{name}", data)
    return path


def test_what_was_exported_is_taken(program: Path, tmp_path: Path) -> None:
    require_data(program)
    require_data(_forge(program, tmp_path / "same.pt2", lambda name, data: data, {}))


def test_forged_files_are_refused(program: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"

    def pickled(name: str, data: bytes) -> bytes:
        buffer = io.BytesIO()
        torch.save((Touch(trap),), buffer)
        return buffer.getvalue() if name == "data/sample_inputs/model.pt" else data

    def model(before: str, after: str) -> Callable[[str, bytes], bytes]:
        def change(name: str, data: bytes) -> bytes:
            assert name != "models/model.json" or before.encode() in data
            return data.replace(before.encode(), after.encode()) if name == "models/model.json" else data

        return change

    def weights(name: str, data: bytes) -> bytes:
        return (
            data.replace(b'"use_pickle": false', b'"use_pickle": true')
            if name.endswith("weights_config.json")
            else data
        )

    def same(name: str, data: bytes) -> bytes:
        return data

    cases: dict[str, tuple[Callable[[str, bytes], bytes], dict[str, bytes]]] = {
        "example inputs": (pickled, {}),
        "calls 'torch.os.system'": (model("torch.ops.aten.softmax.int", "torch.os.system"), {}),
        "calls 'torch.ops.aten.from_file": (
            model("torch.ops.aten.softmax.int", "torch.ops.aten.from_file.default"),
            {},
        ),
        "calls '_operator.methodcaller'": (model("torch.ops.aten.softmax.int", "_operator.methodcaller"), {}),
        "computes a size by": (model("Symbol('", f"__import__('os').mkdir('{trap}') or Symbol('"), {}),
        "builds a collections.defaultdict": (model("builtins.dict", "collections.defaultdict"), {}),
        "pickled tensors": (weights, {}),
        "data/aotinductor": (same, {"data/aotinductor/model/x.so": b"\x7fELF"}),
        "data/constants/custom_obj_0": (same, {"data/constants/custom_obj_0": pickle.dumps(Touch(trap))}),
        "data/weights/model.pt": (same, {"data/weights/model.pt": pickle.dumps(Touch(trap))}),
    }
    for number, (told, (change, extra)) in enumerate(cases.items()):
        path = _forge(program, tmp_path / f"{number}.pt2", change, extra)
        with pytest.raises(Forged) as caught:
            require_data(path)
        assert told in str(caught.value), (told, caught.value)
        with pytest.raises(BadBundle, match="is not loaded"):
            pt2.load(path, None, 1, "cpu")  # type: ignore[arg-type]  # the signature is not looked at
    assert not trap.exists()


def test_the_older_format_of_pickles_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "old.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("version", "8.15")
        archive.writestr("serialized_exported_program.json", json.dumps({}))
        archive.writestr("serialized_state_dict.pt", pickle.dumps(Touch(tmp_path / "trap")))
        archive.writestr("serialized_constants.pt", b"")
        archive.writestr("serialized_example_inputs.pt", b"")
    with pytest.raises(BadBundle):
        pt2.load(path, None, 1, "cpu")  # type: ignore[arg-type]
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("data", [b"", b"PK", b"no archive at all" * 100])
def test_what_is_no_program_is_told_in_a_line(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "p.pt2").write_bytes(data)
    with pytest.raises(BadBundle, match=r"p\.pt2: is no program of torch\.export"):
        pt2.load(tmp_path / "p.pt2", None, 1, "cpu")  # type: ignore[arg-type]


class Convolutions(nn.Module):
    """One weight that only a convolution takes, one that is viewed as well, and a table of four dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding="same")
        self.second = nn.Conv2d(8, 8, 3, padding=1, stride=2)
        self.table = nn.Parameter(torch.randn(1, 8, 2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.first(x)).relu()
        flat: torch.Tensor = y.reshape(x.shape[0], -1) @ self.second.weight.view(-1)[:32].view(32, 1)
        return flat + self.table.view(-1).sum()


def test_weights_of_convolutions_lie_as_pictures_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Convolutions().eval()
    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    path = tmp_path / "program.pt2"
    torch.export.save(torch.export.export(model, (torch.ones(2, 3, 4, 4),), dynamic_shapes=dynamic), path)
    held: list[torch.nn.Module] = []
    on_torch = pt2.on_torch

    def holding(module: torch.nn.Module, device: str) -> Run:
        held.append(module)
        return on_torch(module, device)

    monkeypatch.setattr(pt2, "on_torch", holding)
    run = pt2.load(path, None, 1, "cpu")  # type: ignore[arg-type]
    innermost = {
        name: tensor.is_contiguous(memory_format=torch.channels_last)
        for name, tensor in held[0].named_parameters()
        if tensor.ndim == 4
    }
    assert innermost == {"first.weight": True, "second.weight": False, "table": False}
    pixels = torch.randn(5, 4, 4, 3).permute(0, 3, 1, 2)
    for batch in (pixels, pixels[:1], pixels.contiguous()):
        (found,) = run([batch.numpy()])
        torch.testing.assert_close(torch.from_numpy(found), model(batch).detach())

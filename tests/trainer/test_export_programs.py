"""Networks of every library as programs: any batch, either order of memory, a thousand classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from recipes.image_classification import Config, ImageClassification
from recipes.models import cnn, mlp, timm, torchvision
from recipes.vision.images import ImageInfo
from serving.bundle import Bundle
from serving.runtimes import aoti as aoti_runtime
from serving.runtimes import onnx as onnx_runtime
from serving.runtimes import pt2 as pt2_runtime
from trainer.export.programs import graph_of, pt2

CLASSES = 1000
SIZE = 32
NETWORKS = {
    "cnn": lambda info: cnn.build(cnn.Config(dropout=0.5), info),
    "mlp": lambda info: mlp.build(mlp.Config(widths=[16], dropout=0.5), info),
    "batch norm": lambda info: torchvision.build(torchvision.Config("resnet18"), info),
    "depthwise": lambda info: torchvision.build(torchvision.Config("mobilenet_v3_small"), info),
    "attention": lambda info: timm.build(timm.Config("vit_tiny_patch16_224", options={"img_size": SIZE}), info),
}


def _served(network: str) -> tuple[ImageClassification, Any]:
    torch.manual_seed(0)
    info = ImageInfo(tuple(map(str, range(CLASSES))), (1,) * CLASSES, 3, SIZE, SIZE, (0.4,) * 3, (0.2,) * 3)

    class Data:
        def __init__(self) -> None:
            self.info = info

        def preprocessing(self) -> dict[str, Any]:
            return {"kind": "picture", "channels": 3, "height": SIZE, "width": SIZE, "resize": "crop", "dtype": "uint8"}

        def request(self, split: str, index: int) -> Any:
            raise AssertionError("not asked for here")

    task = ImageClassification(Config(), NETWORKS[network](info), Data())  # type: ignore[arg-type]
    task.model.eval()
    return task, task.servable()


def _pictures(count: int) -> NDArray[np.uint8]:
    """Channels innermost, as a picture's are."""
    pixels = np.random.default_rng(count).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)
    return pixels.transpose(0, 3, 1, 2)


def _require_same(run: Any, task: ImageClassification, servable: Any) -> None:
    for count in (1, 2, 5, 33):
        for pixels in (_pictures(count), np.ascontiguousarray(_pictures(count))):
            with torch.no_grad():
                (wanted,) = servable.answer(task.model, {"image": torch.from_numpy(pixels)})
            (found,) = run([pixels])
            assert found.shape == (count, CLASSES) and found.dtype == np.float32
            assert np.abs(found - wanted.numpy()).max() <= 1e-4


@pytest.mark.parametrize("network", NETWORKS)
def test_networks(network: str, tmp_path: Path) -> None:
    task, servable = _served(network)
    graph = graph_of(servable.module, (torch.from_numpy(np.ascontiguousarray(_pictures(2))),))
    pt2.write(graph, tmp_path / "p.pt2")
    bundle: Bundle = Any  # type: ignore[assignment]  # not looked at
    _require_same(pt2_runtime.load(tmp_path / "p.pt2", bundle, 1, "cpu"), task, servable)
    assert str(Path.home()) not in (tmp_path / "p.pt2").read_bytes().decode("latin-1"), "paths of this machine"


def test_bf16(tmp_path: Path) -> None:
    task, servable = _served("batch norm")
    graph = graph_of(servable.module, (torch.from_numpy(_pictures(2)),), torch.bfloat16)
    pt2.write(graph, tmp_path / "p.pt2")
    assert next(task.model.parameters()).dtype == torch.float32, "the run's own model stays as it is"
    run = pt2_runtime.load(tmp_path / "p.pt2", Any, 1, "cpu")  # type: ignore[arg-type]
    (found,) = run([_pictures(3)])
    with torch.no_grad():
        (wanted,) = servable.answer(task.model, {"image": torch.from_numpy(_pictures(3))})
    assert 0 < np.abs(found - wanted.numpy()).max() < 0.05 and found.dtype == np.float32


def test_onnx(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from trainer.export.programs import onnx

    task, servable = _served("batch norm")
    graph = graph_of(servable.module, (torch.from_numpy(np.ascontiguousarray(_pictures(2))),))
    onnx.write(graph, tmp_path / "p.onnx")

    class Described:
        signature = servable.signature

    _require_same(onnx_runtime.load(tmp_path / "p.onnx", Described(), 1, "cpu"), task, servable)  # type: ignore[arg-type]


def test_aoti(tmp_path: Path) -> None:
    from trainer.export.programs import NotHere, aoti

    try:
        aoti.require()
    except NotHere as error:
        pytest.skip(str(error))
    task, servable = _served("mlp")
    graph = graph_of(servable.module, (torch.from_numpy(np.ascontiguousarray(_pictures(2))),))
    aoti.write(graph, tmp_path / "p.aoti.pt2")
    run = aoti_runtime.load(tmp_path / "p.aoti.pt2", Any, 1, "cpu")  # type: ignore[arg-type]
    _require_same(run, task, servable)

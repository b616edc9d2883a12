from __future__ import annotations

import logging
import os
import pickle
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from recipes.data import digits
from recipes.image_classification import Config, build
from recipes.models import cnn, mlp, timm, torchvision
from recipes.vision.images import ImageInfo
from trainer.blocks import find_blocks
from trainer.component import Component, spec
from trainer.errors import UserError

INFO = ImageInfo(
    class_names=tuple("abcdefg"),
    class_counts=(1,) * 7,
    channels=3,
    height=32,
    width=32,
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
)

OWN = [(mlp, mlp.Config()), (mlp, mlp.Config(widths=[])), (cnn, cnn.Config()), (cnn, cnn.Config(widths=[10, 24]))]


@pytest.mark.parametrize(("module", "config"), OWN)
@pytest.mark.parametrize("size", [8, 28, 64])
def test_own_models_have_no_batch_statistics(module: Any, config: Any, size: int) -> None:
    torch.manual_seed(0)
    model = module.build(config, replace(INFO, channels=1, height=size, width=size)).train()
    pictures = torch.randn(5, 1, size, size)
    together = model(pictures)
    assert together.shape == (5, 7)
    torch.testing.assert_close(model(pictures[2:3]), together[2:3], rtol=1e-4, atol=1e-5)
    together.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_blocks_can_be_found() -> None:
    assert list(find_blocks(mlp.build(mlp.Config(widths=[8, 8, 8]), INFO))) == ["blocks.0", "blocks.1", "blocks.2"]
    assert list(find_blocks(cnn.build(cnn.Config(widths=[8, 8]), INFO))) == ["blocks.0", "blocks.1"]
    assert "layer3.1" in find_blocks(torchvision.build(torchvision.Config("resnet18"), INFO))


def test_dropout_is_only_for_training() -> None:
    for model in (mlp.build(mlp.Config(dropout=0.5), INFO), cnn.build(cnn.Config(dropout=0.5), INFO)):
        pictures = torch.randn(4, 3, 32, 32)
        assert not torch.equal(model.train()(pictures), model(pictures))
        assert torch.equal(model.eval()(pictures), model(pictures))


@pytest.mark.parametrize(
    ("module", "options"), [(mlp, {"widths": [0]}), (cnn, {"widths": []}), (cnn, {"widths": [4, -1]})]
)
def test_own_models_refuse_widths(module: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^widths: "):
        module.Config(**options)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads of OpenMP wait for each other actively, which takes minutes where another program has the core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_the_convnet_learns_digits() -> None:
    """Real data, the whole path: data, task, model, metrics."""
    data = digits.build(digits.Config(), 0)
    torch.manual_seed(0)
    task = build(Config(), Component("model", "cnn", {"widths": [24, 48]}), data)
    train = data.split("train")
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10 * 20)
    task.model.train()
    for epoch in range(10):
        for indices in np.array_split(np.random.default_rng(epoch).permutation(len(train)), 20):
            total, count = task.loss(task.model, train.batch(indices.tolist(), epoch))
            (total / count).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    metrics = task.metrics(torch.device("cpu"))
    test = data.split("test")
    with torch.no_grad():
        task.evaluate(task.model.eval(), test.batch(range(len(test)), 0), metrics)
    assert metrics.compute()["accuracy"] > 0.97


# -- libraries ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "options", "size"),
    [
        ("resnet18", {}, 32),
        ("squeezenet1_1", {"dropout": 0.1}, 64),
        ("vit_b_32", {}, 32),
        ("googlenet", {}, 64),
        ("mobilenet_v3_small", {}, 32),
    ],
)
def test_torchvision_networks(arch: str, options: dict[str, Any], size: int) -> None:
    info = replace(INFO, height=size, width=size)
    model = torchvision.build(torchvision.Config(arch, num_classes=7, options=options), info)
    assert model.training
    assert model(torch.randn(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize(("arch", "channels"), [("resnet18", 1), ("convnext_atto", 3), ("vit_tiny_patch16_224", 3)])
def test_timm_networks(arch: str, channels: int) -> None:
    options = {"img_size": 32} if arch.startswith("vit") else {}
    model = timm.build(timm.Config(arch, options=options), replace(INFO, channels=channels))
    assert model(torch.randn(2, channels, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("module", "config", "info", "message"),
    [
        (torchvision, {"arch": "resnet5"}, INFO, r"model\.arch: torchvision has no 'resnet5', did you mean 'resnet50'"),
        (timm, {"arch": "resnet181"}, INFO, r"model\.arch: timm has no 'resnet181', did you mean 'resnet18'"),
        (torchvision, {"arch": "resnet18", "num_classes": 10}, INFO, r"model\.num_classes: is 10, but the data have 7"),
        (timm, {"arch": "resnet18", "num_classes": 10}, INFO, r"model\.num_classes: is 10, but the data have 7"),
        (
            torchvision,
            {"arch": "resnet18"},
            replace(INFO, channels=1),
            r"3 channels, the data have 1; set data\.channels=3",
        ),
        (torchvision, {"arch": "alexnet"}, INFO, r"model\.arch: alexnet can't take pictures \[3, 32, 32\]"),
        (timm, {"arch": "vit_tiny_patch16_224"}, INFO, r"model\.arch: vit_tiny_patch16_224 can't take pictures"),
        (torchvision, {"arch": "resnet18", "options": {"dropout": 0.1}}, INFO, r"model\.options: resnet18 refuses"),
        (
            torchvision,
            {"arch": "resnet18", "options": {"num_classes": 7}},
            INFO,
            r"model\.options\.num_classes: is set by",
        ),
        (
            torchvision,
            {"arch": "resnet18", "weights": "nowhere.pth"},
            INFO,
            r"model\.weights: there is no file nowhere\.pth",
        ),
    ],
)
def test_mistakes_are_named(module: Any, config: dict[str, Any], info: ImageInfo, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        module.build(module.Config(**config), info)
    assert "\n" not in str(caught.value)


def test_timm_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # what Python finds for a module that is not installed
    with pytest.raises(UserError, match="timm is not installed: pip install timm"):
        timm.build(timm.Config("resnet18"), INFO)


# -- weights ------------------------------------------------------------------------------------------------------


def resnet(num_classes: int = 7, seed: int = 0, **config: Any) -> nn.Module:
    torch.manual_seed(seed)
    info = replace(INFO, class_names=tuple(map(str, range(num_classes))))
    return torchvision.build(torchvision.Config("resnet18", **config), info)


@pytest.mark.parametrize("form", ["weights.safetensors", "weights.pth", "checkpoint.pt", "data_parallel.pt"])
def test_weights_are_loaded(form: str, tmp_path: Path) -> None:
    source, path = resnet(seed=1).state_dict(), tmp_path / form
    if form == "weights.safetensors":
        save_file(source, path)
    elif form == "weights.pth":
        torch.save(source, path)
    elif form == "checkpoint.pt":
        torch.save({"epoch": 3, "model": source, "optimizer": {"lr": 0.1}}, path)
    else:
        torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in source.items()}}, path)
    loaded = resnet(seed=2, weights=str(path)).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in source.items())


def test_a_head_for_other_classes_starts_anew_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = resnet(num_classes=5, seed=1).state_dict()
    save_file(source, tmp_path / "five.safetensors")
    with caplog.at_level(logging.WARNING):
        loaded = resnet(seed=2, weights=str(tmp_path / "five.safetensors")).state_dict()
    assert "has 5 classes, the data 7: fc starts anew" in caplog.text
    fresh = resnet(seed=2).state_dict()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, (fresh if name.startswith("fc.") else source)[name]), name


def test_weights_of_another_network_are_named(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    state = resnet().state_dict()
    state["surplus.weight"] = torch.zeros(2)
    state["layer1.0.conv1.weight"] = torch.zeros(64, 64, 1, 1)
    del state["conv1.weight"]
    save_file(state, path)
    with pytest.raises(UserError) as caught:
        resnet(weights=str(path))
    text = str(caught.value)
    assert "missing: conv1.weight" in text and "unexpected: surplus.weight" in text
    assert "of another shape: layer1.0.conv1.weight [64, 64, 1, 1] for [64, 64, 3, 3]" in text and "\n" not in text


def test_weights_without_the_counters_of_old_files(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({n: t for n, t in resnet(seed=1).state_dict().items() if not n.endswith("num_batches_tracked")}, path)
    assert torch.equal(resnet(seed=2, weights=str(path)).conv1.weight, resnet(seed=1).conv1.weight)


class Touch:
    """Unpickling this runs a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_files_that_would_run_code_are_refused(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    torch.save({"model": Touch(trap)}, tmp_path / "trap.pth")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Touch(trap)))
    for name in ("trap.pth", "plain.pt"):
        with pytest.raises(UserError, match=r"holds more than tensors|cannot be read"):
            resnet(weights=str(tmp_path / name))
    assert not trap.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", b"short", "cannot be read"),
        ("a.pth", b"PK\x03\x04 broken", "cannot be read"),
        ("a.bin", b"", r"should end with \.safetensors, \.pt or \.pth"),
    ],
)
def test_damaged_weights(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        resnet(weights=str(tmp_path / name))


def test_a_file_without_weights(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="holds no state_dict"):
        resnet(weights=str(tmp_path / "a.pt"))


# -- as components ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("recipe", "image_classification"),
        *(("model", name) for name in ("cnn", "mlp", "timm", "torchvision")),
        *(("data", name) for name in ("digits", "fashion_mnist", "image_folder")),
    ],
)
def test_configs_can_be_read_without_importing_and_explain_each_field(kind: str, name: str) -> None:
    found = spec(kind, name)
    assert found.doc
    assert set(found.help_by_field) == set(found.config_class.__dataclass_fields__)
    module = Component(kind, name, {}).module()
    assert list(found.config_class.__dataclass_fields__) == list(module.Config.__dataclass_fields__)

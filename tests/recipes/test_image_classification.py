from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from recipes.image_classification import Config, ImageClassification, build
from recipes.vision.images import ImageInfo, ImageSplits
from recipes.vision.mixing import mix
from trainer.errors import UserError

COUNTS = (10, 30, 20, 40)
INFO = ImageInfo(
    class_names=("a", "b", "c", "d"),
    class_counts=COUNTS,
    channels=3,
    height=6,
    width=5,
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.25, 0.3),
)


class ModelSection:
    """The `model` section of a config, with a network of our own."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def build(self, info: ImageInfo) -> nn.Module:
        return self.network


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 5, 4))


def make_task(config: Config | None = None, network: nn.Module | None = None) -> ImageClassification:
    return build(config or Config(), ModelSection(network or linear()), ImageSplits(INFO, "", {}))


def make_batch(num: int = 16, seed: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (num, 6, 5, 3), generator=generator, dtype=torch.uint8)
    return {
        "image": pixels.permute(0, 3, 1, 2),
        "label": torch.randint(0, 4, (num,), generator=generator),
        "index": torch.arange(num),
        "bad": [],
    }


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (INFO.mean, INFO.std))
    return ((images.double() / 255 - mean) / std).float()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [[], [0.5, 2.0, 1.0, 0.0], "balanced"])
def test_loss_is_that_of_torch(smoothing: float, weights: Any) -> None:
    balanced = weights == "balanced"
    task = make_task(
        Config(label_smoothing=smoothing, class_weights=[] if balanced else weights, balance_classes=balanced)
    )
    batch = make_batch()
    total, count = task.loss(task.model, batch)

    expected_weights = [sum(COUNTS) / (4 * count) for count in COUNTS] if balanced else weights
    reference = nn.CrossEntropyLoss(
        torch.tensor(expected_weights) if expected_weights else None, label_smoothing=smoothing, reduction="mean"
    )
    expected = reference(task.model(normalised(batch["image"])), batch["label"])
    torch.testing.assert_close(total / count, expected, rtol=1e-5, atol=1e-6)
    if not expected_weights:
        assert count == 16 and type(count) is int


@pytest.mark.parametrize("weights", [[], [0.5, 2.0, 1.0, 0.25]])
def test_loss_does_not_depend_on_how_the_batch_is_cut(weights: list[float]) -> None:
    task = make_task(Config(label_smoothing=0.1, class_weights=weights))
    batch = make_batch(15)
    whole, whole_count = task.loss(task.model, batch)
    parts = [
        task.loss(task.model, {"image": batch["image"][start:stop], "label": batch["label"][start:stop], "bad": []})
        for start, stop in itertools.pairwise([0, 1, 7, 7, 15])
    ]
    torch.testing.assert_close(sum(part for part, _ in parts), whole)
    assert sum(count for _, count in parts) == pytest.approx(whole_count)


def test_pictures_are_normalised_on_the_device_and_floats_pass() -> None:
    seen = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = linear()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images)
            return self.net(images)

    task = make_task(network=Spy())
    batch = make_batch()
    task.loss(task.model, batch)
    torch.testing.assert_close(seen[0], normalised(batch["image"]), rtol=1e-5, atol=1e-5)
    floats = {**batch, "image": normalised(batch["image"]) + 1}
    task.loss(task.model, floats)
    assert torch.equal(seen[1], floats["image"])


def test_pictures_of_any_size_and_order_of_memory_are_normalised() -> None:
    seen = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(4))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images)
            return self.bias.expand(len(images), 4)

    task = make_task(network=Spy())
    nhwc = make_batch()["image"]
    for images in (nhwc, nhwc.contiguous(), nhwc[:, :, :4, :3], nhwc[:3], nhwc.contiguous()[..., :2], nhwc):
        task.loss(task.model, {"image": images, "label": torch.zeros(len(images), dtype=torch.int64)})
        torch.testing.assert_close(seen[-1], normalised(images), rtol=1e-5, atol=1e-5)


def test_half_precision_weights_get_half_precision_pictures() -> None:
    task = make_task(network=linear().bfloat16())
    torch.set_default_dtype(torch.bfloat16)  # what Fabric's half precision does around the forward pass
    try:
        total, _ = task.loss(task.model, make_batch())
        mixed, _ = make_task(Config(mixup=0.2, cutmix=1.0), linear().bfloat16()).loss(task.model, make_batch())
    finally:
        torch.set_default_dtype(torch.float32)
    assert total.dtype == torch.float32 and torch.isfinite(total) and torch.isfinite(mixed)


def test_a_batch_without_samples_has_a_graph_to_all_parameters() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
    )
    statistics = copy.deepcopy(network[1].state_dict())
    task = make_task(Config(class_weights=[1.0, 2.0, 3.0, 4.0], mixup=0.5), network.train())
    batch = {name: value[:0] for name, value in make_batch().items()}
    total, count = task.loss(network, batch)
    total.backward()
    assert float(total.detach()) == 0 and count == 0
    assert all(p.grad is not None and not p.grad.any() for p in network.parameters())
    assert all(torch.equal(value, statistics[name]) for name, value in network[1].state_dict().items())


@pytest.mark.parametrize("config", [Config(mixup=0.4), Config(cutmix=1.0), Config(mixup=0.4, cutmix=1.0)])
def test_mixing_follows_the_global_generator_and_only_in_training(config: Config) -> None:
    task = make_task(config)
    batch = make_batch()
    plain, _ = make_task().loss(task.model, batch)

    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return task.loss(task.model.train(), batch)[0]

    assert torch.equal(draw(3), draw(3))
    assert len({float(draw(seed).detach()) for seed in range(8)}) > 6
    assert torch.equal(task.loss(task.model.eval(), batch)[0], plain)


def test_mixed_loss_is_that_of_soft_labels() -> None:
    """With blended labels, cross-entropy over probabilities gives the same number."""
    task = make_task(Config(mixup=0.7, label_smoothing=0.1))
    batch = make_batch()
    torch.manual_seed(5)
    total, count = task.loss(task.model.train(), batch)

    torch.manual_seed(5)
    images, partner, own = mix(normalised(batch["image"]), 0.7, 0.0)
    one_hot = nn.functional.one_hot(batch["label"], 4).float()
    soft = own * one_hot + (1 - own) * one_hot[partner]
    expected = nn.functional.cross_entropy(task.model(images), soft, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(total, expected)
    assert count == pytest.approx(16)


def test_cutmix_pastes_a_rectangle_and_weighs_by_its_area() -> None:
    images = torch.arange(8.0)[:, None, None, None].expand(8, 3, 32, 24).contiguous()
    before = images.clone()
    for seed in range(30):
        torch.manual_seed(seed)
        mixed, partner, own = mix(images, 0.0, 1.0)
        assert torch.equal(images, before)
        pasted = mixed != images
        foreign = [i for i in range(8) if partner[i] != i]
        for i in foreign:
            rows, columns = pasted[i, 0].any(1), pasted[i, 0].any(0)
            assert torch.equal(pasted[i, 0], rows[:, None] & columns[None])
            assert 1 - pasted[i].float().mean() == pytest.approx(own, abs=1e-6)
            assert (mixed[i][pasted[i]] == partner[i]).all()


def test_evaluation_does_not_mix_and_counts_each_sample_once() -> None:
    task = make_task(Config(mixup=0.5, cutmix=1.0, label_smoothing=0.2, class_weights=[1.0, 2.0, 3.0, 4.0]))
    batch = make_batch()
    metrics = task.metrics(torch.device("cpu"))
    with torch.no_grad():
        task.evaluate(task.model.eval(), batch, metrics)
        task.evaluate(task.model, {name: value[:0] for name, value in batch.items()}, metrics)
        logits = task.model(normalised(batch["image"]))
    values = metrics.compute()
    assert values["accuracy"] == float((logits.argmax(1) == batch["label"]).double().mean())
    assert values["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, batch["label"])), rel=1e-5)


def test_wrong_outputs_and_weights_are_the_users_to_mend() -> None:
    task = make_task(network=nn.Sequential(nn.Flatten(), nn.Linear(90, 7)))
    with pytest.raises(UserError, match=r"model: gives \[16, 7\]; image_classification needs logits \[16, 4\]"):
        task.loss(task.model, make_batch())
    with pytest.raises(UserError, match=r"class_weights: 2 values, but the data have 4 classes"):
        make_task(Config(class_weights=[1.0, 2.0]))
    with pytest.raises(ValueError, match=r"^balance_classes: "):
        Config(class_weights=[1.0], balance_classes=True)
    with pytest.raises(ValueError, match=r"^class_weights: "):
        Config(class_weights=[1.0, -1.0])

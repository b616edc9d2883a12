"""Digits and Fashion-MNIST: data that fit in memory."""

from __future__ import annotations

import gzip
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import environment

from recipes.data import digits, fashion_mnist
from recipes.vision.arrays import ArrayDataset
from recipes.vision.splits import stratified_split
from trainer.errors import UserError


def split(data: Any, name: str) -> ArrayDataset:
    dataset = data.split(name)
    assert isinstance(dataset, ArrayDataset)
    return dataset


def test_digits_are_those_of_scikit_learn_each_in_one_split() -> None:
    from sklearn.datasets import load_digits

    reference = load_digits()
    pixels = np.rint(reference.images * 255 / 16).astype(np.uint8)
    expected = sorted(zip(pixels.tolist(), reference.target.tolist(), strict=True))
    data = digits.build(digits.Config(), 0)
    parts = [split(data, name) for name in ("train", "val", "test")]
    assert [len(part) for part in parts] == [1259, 269, 269]
    found = [pair for part in parts for pair in zip(part.images.tolist(), part.labels.tolist(), strict=True)]
    assert sorted(found) == expected
    assert all(np.bincount(part.labels).min() >= 0.14 * len(part) / 2 for part in parts)
    counts = np.array([np.bincount(part.labels) for part in parts])
    np.testing.assert_allclose(counts / counts.sum(0), np.tile([[0.7], [0.15], [0.15]], 10), atol=0.006)
    assert data.info.class_counts == tuple(counts[0].tolist()) and data.info.num_classes == 10


def test_digits_stay_in_their_splits() -> None:
    """The hash may only change together with the data set's file: models are compared across versions."""
    data = digits.build(digits.Config(), 0)
    assert data.fingerprint == digits.build(digits.Config(augment=["NoOp"]), 7).fingerprint
    assert data.fingerprint.startswith("83eb78c45c3057c5")
    assert digits.build(digits.Config(split_seed=1), 0).fingerprint != data.fingerprint


def test_digits_batches() -> None:
    train = split(digits.build(digits.Config(), 0), "train")
    batch = train.batch((5, 1000, 5), 3)
    assert batch["image"].shape == (3, 1, 8, 8) and batch["image"].dtype == torch.uint8
    assert np.array_equal(batch["image"][:, 0].numpy(), train.images[[5, 1000, 5]])
    assert batch["label"].tolist() == train.labels[[5, 1000, 5]].tolist()
    assert batch["index"].tolist() == [5, 1000, 5] and batch["bad"] == []
    assert train.batch([], 0)["image"].shape == (0, 1, 8, 8)


def test_digits_need_no_imaging_library() -> None:
    script = (
        "import sys\nfrom recipes.data import digits\nfrom recipes import image_classification\n"
        "digits.build(digits.Config(), 0).split('train').batch([1, 2], 0)\n"
        "heavy = {'sklearn', 'scipy', 'albumentations', 'cv2', 'PIL', 'torchvision', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_sizes_and_channels() -> None:
    data = digits.build(digits.Config(image_size=32, channels=3), 0)
    assert (data.info.channels, data.info.height, data.info.width) == (3, 32, 32)
    assert data.info.mean == (0.305,) * 3
    train = split(data, "train")
    several, alone = train.batch(range(40), 0)["image"], train.batch([17], 0)["image"]
    assert several.shape == (40, 3, 32, 32) and several.dtype == torch.uint8
    assert torch.equal(several[17], alone[0]) and torch.equal(alone[0, 0], alone[0, 2])
    small = torch.nn.functional.avg_pool2d(several[:, :1].float(), 4)[:, 0].numpy()
    assert np.abs(small - train.images[:40]).mean() < 25


def test_augmented_digits() -> None:
    def build(seed: int) -> Any:
        return digits.build(digits.Config(augment=[{"Affine": {"rotate": [-15, 15], "p": 1}}], image_size=12), seed)

    train = split(build(0), "train")
    batch = train.batch(range(20), 1)["image"]
    assert batch.shape == (20, 1, 12, 12)
    assert torch.equal(split(build(0), "train").batch([9, 3], 1)["image"], batch[[9, 3]])
    assert not torch.equal(train.batch(range(20), 2)["image"], batch)
    assert not torch.equal(split(build(1), "train").batch(range(20), 1)["image"], batch)
    plain = split(digits.build(digits.Config(image_size=12), 0), "val").batch(range(5), 0)["image"]
    assert torch.equal(split(build(0), "val").batch(range(5), 9)["image"], plain)


def test_transforms_that_do_not_fit() -> None:
    with pytest.raises(UserError, match=r"data\.augment: .*rop"):
        digits.build(digits.Config(augment=[{"RandomCrop": {"height": 9, "width": 9}}]), 0)
    with pytest.raises(UserError, match=r"data\.transform\[0\]"):
        digits.build(digits.Config(transform=["Nope"]), 0)
    with pytest.raises(ValueError, match=r"^test_fraction: "):
        digits.Config(val_fraction=0.5, test_fraction=0.5)
    with pytest.raises(ValueError, match=r"^std: "):
        digits.Config(std=[0.0])


@pytest.mark.parametrize("counts", [[10, 20, 3], [1, 2, 100], [1], []])
def test_stratified_split(counts: list[int]) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    parts = stratified_split(labels, [0.2, 0.3], seed=3)
    assert sorted(np.concatenate(parts).tolist()) == list(range(sum(counts)))
    for label, count in enumerate(counts):
        rest, first, second = (int((labels[part] == label).sum()) for part in parts)
        assert rest >= 1
        assert abs(first - 0.2 * count) <= 1 and abs(second - 0.3 * count) <= 1


# -- Fashion-MNIST ------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_fashion(folder: Path, compress: bool) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    arrays = {}
    for prefix, num in (("train", 200), ("t10k", 30)):
        arrays[f"{prefix}-images-idx3-ubyte"] = random.integers(0, 256, (num, 28, 28), dtype=np.uint8)
        arrays[f"{prefix}-labels-idx1-ubyte"] = random.permutation(np.arange(num) % 10).astype(np.uint8)
    for name, array in arrays.items():
        path = folder / (f"{name}.gz" if compress else name)
        path.write_bytes(gzip.compress(idx(array)) if compress else idx(array))
    return arrays


@pytest.mark.parametrize("compress", [True, False])
def test_fashion_mnist(compress: bool, tmp_path: Path) -> None:
    arrays = write_fashion(tmp_path, compress)
    data = fashion_mnist.build(fashion_mnist.Config(path=str(tmp_path)), 0)
    train, val, test = (split(data, name) for name in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (180, 20, 30)
    assert np.bincount(val.labels).tolist() == [2] * 10
    assert np.array_equal(test.images, arrays["t10k-images-idx3-ubyte"])
    assert np.array_equal(test.labels, arrays["t10k-labels-idx1-ubyte"])
    found = np.concatenate([train.images, val.images]).tolist()
    assert sorted(found) == sorted(arrays["train-images-idx3-ubyte"].tolist())
    assert data.info.class_names[9] == "Ankle boot" and (data.info.height, data.info.channels) == (28, 1)


def test_fashion_mnist_files_that_cannot_be_used(tmp_path: Path) -> None:
    write_fashion(tmp_path, compress=True)
    images, labels = tmp_path / "train-images-idx3-ubyte.gz", tmp_path / "train-labels-idx1-ubyte.gz"
    good = {path: path.read_bytes() for path in (images, labels)}

    def refused(path: Path, content: bytes, message: str) -> None:
        path.write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            fashion_mnist.build(fashion_mnist.Config(path=str(tmp_path)), 0)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        path.write_bytes(good[path])

    raw = gzip.decompress(good[images])
    refused(images, good[images][:3000], "damaged or cut off")
    refused(images, good[images][:3000] + b"xxxx" + good[images][3004:], "damaged or cut off")
    refused(images, b"", "starts with nothing")
    refused(images, raw[:10], "cut off within its header")
    refused(images, raw[:-1], r"holds 156799 bytes of data, but its header says 156800 \(\[200, 28, 28\]\)")
    refused(images, raw + b"x", "holds 156801 bytes")
    refused(images, gzip.decompress(good[labels]), "starts with 00 00 08 01, .* with 00 00 08 03")
    refused(images, idx(np.zeros((199, 28, 28), np.uint8)), "has 199 pictures, but .* 200 labels")
    refused(labels, idx(np.full(200, 10, np.uint8)), "has the label 10; expected 0 to 9")

    images.unlink()
    with pytest.raises(UserError, match=r"has neither train-images-idx3-ubyte nor train-images-idx3-ubyte\.gz"):
        fashion_mnist.build(fashion_mnist.Config(path=str(tmp_path)), 0)
    with pytest.raises(UserError, match="there is no folder"):
        fashion_mnist.build(fashion_mnist.Config(path=str(tmp_path / "missing")), 0)


def test_digits_are_cut_anew() -> None:
    data = digits.build(digits.Config(augment=[{"InvertImg": {"p": 1.0}}]), 0)
    pool = data.pool(None)
    assert pool.size == 1259 + 269 and pool.keys is None and pool.labels is not None
    images = np.concatenate([split(data, name).images for name in ("train", "val")])
    val = np.arange(1000, 1400)
    train = np.setdiff1d(np.arange(pool.size), val)
    cut = data.divide(train, val)
    assert (split(cut, "train").images == images[train]).all() and (split(cut, "val").labels == pool.labels[val]).all()
    assert (split(cut, "test").images == split(data, "test").images).all()
    assert cut.info.class_counts == tuple(np.bincount(pool.labels[train]).tolist()) != data.info.class_counts
    # Each is seen as its new split is: what was val before is augmented now, and what was train no more.
    for name, part, is_augmented in (("train", train, True), ("val", val, False)):
        seen = split(cut, name).batch([0, len(part) - 1], 0)["image"][:, 0].numpy()
        assert (seen == (255 - images[part][[0, -1]] if is_augmented else images[part][[0, -1]])).all()
    assert len({data.fingerprint, cut.fingerprint, data.divide(train, None).fingerprint}) == 3
    whole = data.divide(np.arange(pool.size), None)
    assert whole.split("val") is None and len(split(whole, "train")) == pool.size
    assert whole.divide(train, val).fingerprint == cut.fingerprint, "what was cut can be cut again"
    with pytest.raises(UserError, match=r"holdout.group_by: got 'person', but these pictures have neither groups nor"):
        data.pool("person")


def test_without_a_val_split_the_size_is_that_of_evaluation() -> None:
    data = digits.build(digits.Config(augment=[{"RandomCrop": {"height": 6, "width": 6}}]), 0)
    assert (data.info.height, data.info.width) == (8, 8)
    whole = data.divide(np.arange(data.pool(None).size), None)
    assert (whole.info.height, whole.info.width) == (8, 8)

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from recipes.data.image_folder import Config, build
from recipes.vision.folder import FolderData
from trainer.config import Loading
from trainer.errors import UserError
from trainer.loading import load
from trainer.sampling import Plan

CLASSES = ("bee", "cat", "dog")


def save(path: Path, height: int = 40, width: int = 48, value: int | None = None) -> None:
    """A picture of noise, or of one grey value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(abs(hash(path.name)) % 2**32)
    pixels = (
        random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        if value is None
        else np.full((height, width, 3), value, np.uint8)
    )
    assert cv2.imwrite(str(path), pixels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train: 10 pictures a class, val: 2 a class; the grey value of a picture is 80 × its class, plus its number."""
    for (label, name), number in itertools.product(enumerate(CLASSES), range(10)):
        save(tmp_path / "train" / name / f"{number}.png", value=80 * label + number)
    for (label, name), number in itertools.product(enumerate(CLASSES), range(2)):
        save(tmp_path / "val" / name / f"{number}.png", value=80 * label + number)
    return tmp_path


def make(path: Path, seed: int = 0, **options: Any) -> FolderData:
    return build(Config(path=str(path), **{"image_size": 32, **options}), seed)


def test_splits_labels_and_batches(folder: Path) -> None:
    data = make(folder)
    train, val = data.split("train"), data.split("val")
    assert train is not None and val is not None and data.split("test") is None
    assert (len(train), len(val)) == (30, 6)
    assert data.info.class_names == CLASSES and data.info.class_counts == (10, 10, 10)
    assert (data.info.channels, data.info.height, data.info.width) == (3, 32, 32)

    batch = train.batch([29, 0, 15], 0)
    assert batch["image"].shape == (3, 3, 32, 32) and batch["image"].dtype == torch.uint8
    assert batch["image"][:, 0, 0, 0].tolist() == [169, 0, 85]
    assert batch["label"].tolist() == [2, 0, 1] and batch["label"].dtype == torch.int64
    assert batch["index"].tolist() == [29, 0, 15] and batch["bad"] == []


def test_layouts(tmp_path: Path) -> None:
    """Nested folders, links, capitals, hidden files and other files."""
    train = tmp_path / "train"
    save(train / "a" / "deep" / "er" / "1.png")
    save(train / "a" / "2.jpg")
    (train / "a" / "2.jpg").rename(train / "a" / "2.JPEG")
    save(train / "a" / ".hidden.png")
    save(train / "a" / ".cache" / "3.png")
    (train / "a" / "notes.txt").write_text("not a picture")
    save(tmp_path / "elsewhere" / "ä.png")
    (train / "b").symlink_to(tmp_path / "elsewhere")
    (train / "a" / "loop").symlink_to(train / "a")
    save(train / ".git" / "4.png")
    (train / "README.md").write_text("not a class")

    data = make(tmp_path, val_fraction=0.0)
    assert data.info.class_names == ("a", "b")
    names = [os.path.relpath(data.files["train"].path(i), train) for i in range(len(data.files["train"]))]
    assert names == ["a/2.JPEG", "a/deep/er/1.png", "b/ä.png"]
    assert data.split("train").batch([0, 1, 2], 0)["bad"] == []
    assert data.split("val") is None


def test_val_is_carved_from_train_where_there_is_none(folder: Path) -> None:
    (folder / "val").rename(folder / "test")
    data = make(folder, val_fraction=0.2)
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [24, 6, 6]
    assert data.info.class_counts == (8, 8, 8)
    labels = data.split("val").batch(range(6), 0)["label"]
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    paths = {name: {files.path(i) for i in range(len(files))} for name, files in data.files.items()}
    assert not paths["train"] & paths["val"] and len(paths["train"] | paths["val"]) == 30
    assert make(folder, val_fraction=0.2, seed=7).fingerprint == data.fingerprint
    assert make(folder, val_fraction=0.2, split_seed=1).fingerprint != data.fingerprint


def test_fingerprint_follows_names_and_sizes(folder: Path) -> None:
    before = make(folder).fingerprint
    assert before == make(folder, augment=["HorizontalFlip"]).fingerprint and len(before) == 64
    (folder / "train" / "cat" / "3.png").rename(folder / "train" / "cat" / "33.png")
    renamed = make(folder).fingerprint
    save(folder / "train" / "cat" / "33.png", height=41)
    assert len({before, renamed, make(folder).fingerprint}) == 3


def test_unreadable_pictures_are_left_out_and_listed(folder: Path) -> None:
    train = folder / "train"
    data = make(folder)
    (train / "bee" / "1.png").write_bytes(b"")
    (train / "bee" / "2.png").write_bytes((train / "bee" / "2.png").read_bytes()[:60])
    (train / "bee" / "3.png").unlink()
    batch = data.split("train").batch([4, 1, 2, 3, 0], 0)
    assert batch["index"].tolist() == [4, 0] and batch["label"].tolist() == [0, 0] and len(batch["image"]) == 2
    assert batch["image"][:, 0, 0, 0].tolist() == [4, 0]
    assert [index for index, _ in batch["bad"]] == [1, 2, 3]
    reasons = [reason for _, reason in batch["bad"]]
    assert all(str(train / "bee" / f"{i}.png") in reason for i, reason in zip((1, 2, 3), reasons, strict=True))
    assert "empty" in reasons[0] and "decoded" in reasons[1] and "No such file" in reasons[2]

    nothing = data.split("train").batch([1, 3], 0)
    assert nothing["image"].shape == (0, 3, 32, 32) and nothing["label"].shape == (0,) and len(nothing["bad"]) == 2


AUGMENT = [{"RandomResizedCrop": {"size": [24, 24]}}, "HorizontalFlip", {"ColorJitter": {"p": 0.5}}]


def test_workers_give_the_same_pictures_as_the_training_process(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        save(path)  # noise, so that every crop differs
    train = make(folder, seed=3, augment=AUGMENT, image_size=None).split("train")

    def pictures(workers: int, batch_size: int, consumed: int) -> dict[tuple[int, int], bytes]:
        plan = Plan(len(train), batch_size, seed=5)
        micros = itertools.takewhile(lambda micro: micro.epoch < 2, plan.training(consumed, rank=0))
        loaded = load(train, micros, Loading(batch_size=batch_size, workers=workers), torch.device("cpu"))
        return {
            (one.micro.epoch, int(index)): image.numpy().tobytes()
            for one in loaded
            for index, image in zip(one.batch["index"], one.batch["image"], strict=True)
        }

    alone = pictures(0, 7, 0)
    assert len(alone) == 60 and len(set(alone.values())) == 60
    assert pictures(2, 4, 0) == alone
    resumed = pictures(1, 5, 20)
    assert resumed == {key: alone[key] for key in resumed} and len(resumed) == 40
    other = make(folder, seed=4, augment=AUGMENT, image_size=None).split("train").batch([0], 0)["image"]
    assert other.numpy().tobytes() != alone[0, 0]


def test_sizes(tmp_path: Path) -> None:
    for split, number in itertools.product(("train", "val"), range(4)):
        save(tmp_path / split / "a" / f"{number}.png", *((60, 80) if number % 2 else (100, 40)))

    def shapes(image_size: int | None = None, **options: Any) -> tuple[tuple[int, ...], ...]:
        data = make(tmp_path, image_size=image_size, **options)
        train, val = (data.split(name).batch(range(4), 0)["image"].shape for name in ("train", "val"))
        assert (data.info.height, data.info.width) == tuple(val[2:])
        return tuple(train[1:]), tuple(val[1:])

    crop = [{"RandomResizedCrop": {"size": [24, 32]}}]
    assert shapes(augment=crop) == ((3, 24, 32), (3, 24, 32))
    assert shapes(augment=crop, image_size=16) == ((3, 16, 16), (3, 16, 16))
    assert shapes(augment=crop, transform=[{"Resize": {"height": 48, "width": 40}}]) == ((3, 24, 32), (3, 48, 40))
    assert shapes(image_size=20, channels=1) == ((1, 20, 20), (1, 20, 20))
    with pytest.raises(UserError, match=r"pictures end with different sizes.*set data\.image_size"):
        shapes(augment=["HorizontalFlip"])
    with pytest.raises(UserError, match=r"no picture of those tried.*data\.augment: "):
        shapes(augment=[{"RandomCrop": {"height": 500, "width": 500}}])


def test_pictures_of_one_size_need_no_setting(folder: Path) -> None:
    data = make(folder, image_size=None)
    assert (data.info.height, data.info.width) == (40, 48)
    batch = data.split("val").batch([3], 0)
    assert batch["image"].shape == (1, 3, 40, 48)
    save(folder / "train" / "dog" / "1.png", 20, 20)
    with pytest.raises(UserError, match=r"dog/1\.png"):
        make(folder, image_size=None).split("train").batch(range(30), 0)


def test_float_pictures(folder: Path) -> None:
    batch = make(folder, augment=["Normalize"]).split("train").batch([0], 0)
    assert batch["image"].dtype == torch.float32
    assert batch["image"][0, 0, 0, 0] == pytest.approx(-0.485 / 0.229, rel=1e-4)


def test_mean_and_std_by_channels(folder: Path) -> None:
    assert make(folder).info.std == (0.229, 0.224, 0.225)
    assert make(folder, channels=1).info.mean == pytest.approx((0.449,))
    assert make(folder, mean=[0.5], std=[0.25]).info.mean == (0.5, 0.5, 0.5)
    with pytest.raises(UserError, match=r"data\.mean: has 2 values for 3 channels"):
        make(folder, mean=[0.5, 0.5])


def test_folders_that_cannot_be_used(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            make(path)
        assert "\n" not in str(caught.value)

    elsewhere = tmp_path_factory.mktemp("other")
    refused(elsewhere / "missing", r"data\.path: there is no folder .*missing")
    refused(elsewhere, r"data\.path: .* has no folder `train`")
    (elsewhere / "train").mkdir()
    refused(elsewhere, r"train has no class folders")
    save(elsewhere / "train" / "1.png")
    refused(elsewhere, r"train has no class folders")

    (folder / "train" / "ant").mkdir()
    (folder / "train" / "ant" / "readme.txt").write_text("")
    refused(folder, r"class folders of .*train without pictures: ant")
    save(folder / "train" / "ant" / "1.png")
    refused(folder, r"class folders of val and train differ: only in train: ant")
    save(folder / "val" / "fox" / "1.png")
    refused(folder, r"only in val: fox; only in train: ant")


def test_all_pictures_broken(tmp_path: Path) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "1.jpg").write_bytes(b"no jpeg")
    with pytest.raises(UserError, match=r"no picture of those tried can be used: .*1\.jpg: cannot be decoded"):
        make(tmp_path)


def paths(data: FolderData, name: str) -> list[str]:
    files = data.files[name]
    return [
        os.path.relpath(files.path(index), os.path.dirname(files.path(index)) + "/../..") for index in range(len(files))
    ]


def test_a_folder_is_cut_anew(folder: Path) -> None:
    for name in CLASSES:
        save(folder / "test" / name / "0.png", value=5)
    data = make(folder, augment=[{"InvertImg": {"p": 1.0}}])
    pool = data.pool(None)
    assert pool.size == 36 and pool.keys is None and pool.labels is not None
    val = np.array([0, 11, 31, 35])  # two of them were val before
    train = np.setdiff1d(np.arange(36), val)
    cut = data.divide(train, val)
    found = [str(Path(cut.files["val"].path(index)).relative_to(folder)) for index in range(4)]
    assert found == ["train/bee/0.png", "train/cat/1.png", "val/bee/1.png", "val/dog/1.png"]
    assert cut.info.class_counts == tuple(np.bincount(pool.labels[train]).tolist())
    seen = {name: cut.datasets[name].batch([0, 1], 0)["image"].flatten(1)[:, 0].tolist() for name in ("train", "val")}
    assert seen == {"train": [255 - 1, 255 - 2], "val": [0, 81]}
    assert paths(cut, "test") == paths(data, "test") and len({data.fingerprint, cut.fingerprint}) == 2
    whole = data.divide(np.arange(36), None)
    assert whole.split("val") is None and len(whole.files["train"]) == 36


def test_a_folder_without_val_is_cut_anew(folder: Path) -> None:
    for name in CLASSES:
        for file in (folder / "val" / name).iterdir():
            file.unlink()
        (folder / "val" / name).rmdir()
    (folder / "val").rmdir()
    for fraction in (0.0, 0.2):
        data = make(folder, val_fraction=fraction)
        cut = data.divide(np.arange(1, 30), np.arange(1))
        everything = {
            Path(cut.files[name].path(index)) for name in ("train", "val") for index in range(len(cut.files[name]))
        }
        assert len(everything) == 30 and data.pool(None).size == 30


def test_paths_make_groups_and_times(folder: Path) -> None:
    data = make(folder)
    keys = data.pool(r"/(\d+)\.png").keys
    assert keys is not None and keys.tolist() == [*range(10)] * 3 + [0, 1] * 3, "numbers are numbers"
    names = data.pool("bee|cat|dog").keys
    assert (
        names is not None
        and names.tolist() == ["bee"] * 10 + ["cat"] * 10 + ["dog"] * 10 + ["bee"] * 2 + ["cat"] * 2 + ["dog"] * 2
    )
    with pytest.raises(UserError, match=r"holdout.group_by: 'patient' is not found in the path .*/train/bee/0.png"):
        data.pool("patient")
    with pytest.raises(UserError, match=r"holdout.group_by: '\(' is no regular expression"):
        data.pool("(")

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from recipes.vision.augment import Pipeline
from serving.pictures import UnreadableImage
from trainer.errors import UserError
from trainer.task import sample_seed

PICTURES = [np.random.default_rng(i).integers(0, 256, (48 + i, 56, 3), dtype=np.uint8) for i in range(4)]

RANDOM: list[Any] = [
    "HorizontalFlip",
    {"RandomResizedCrop": {"size": [24, 24]}},
    {"Affine": {"rotate": [-20, 20], "scale": [0.8, 1.2]}},
    {"ColorJitter": None},
    {"GaussNoise": {"p": 0.8}},
    {"CoarseDropout": {"p": 0.8}},
    {"ElasticTransform": {}},
    {"ShotNoise": {}},
    {"PixelDropout": {}},
    {"GridDropout": {}},
    {"RandomFog": {}},
    {"ISONoise": {}},
    {"OneOf": {"transforms": ["Blur", {"MotionBlur": {"blur_limit": 5}}, "MedianBlur"], "p": 0.7}},
    {"SomeOf": {"transforms": ["VerticalFlip", "Transpose", "RandomRotate90"], "n": 2}},
]


@pytest.mark.parametrize("entry", RANDOM, ids=str)
def test_a_sample_is_transformed_alike_in_any_order_and_worker(entry: Any) -> None:
    """Two pipelines stand for two workers; other users of the global generators must not matter."""
    first, second = Pipeline([entry], "augment"), Pipeline([entry], "augment")
    cases = [(index, epoch) for epoch in range(3) for index in range(8)]

    def run(pipeline: Pipeline, order: list[tuple[int, int]]) -> dict[tuple[int, int], np.ndarray]:
        return {(i, e): pipeline(PICTURES[i % 4], sample_seed(1, e, i)).copy() for i, e in order}

    expected = run(first, cases)
    np.random.seed(9)
    random.seed(9)
    shuffled = random.sample(cases, len(cases))
    results = run(second, shuffled)
    assert all(np.array_equal(expected[case], results[case]) for case in cases)
    assert any(len({expected[index, epoch].tobytes() for epoch in range(3)}) > 1 for index in range(8))


def test_randomness_is_spread_as_it_should_be() -> None:
    flip = Pipeline(["HorizontalFlip"], "augment")
    picture = PICTURES[0]
    flipped = sum(not np.array_equal(flip(picture, sample_seed(0, 0, i)), picture) for i in range(2000))
    assert 900 < flipped < 1100
    crop = Pipeline([{"RandomCrop": {"height": 8, "width": 8}}], "augment")
    assert len({crop(picture, sample_seed(0, 0, i)).tobytes() for i in range(200)}) > 180


def test_constants_of_opencv() -> None:
    near = Pipeline([{"Resize": {"height": 96, "width": 112, "interpolation": "cv2.INTER_NEAREST"}}], "augment")
    assert np.array_equal(near(PICTURES[0], 0), PICTURES[0].repeat(2, 0).repeat(2, 1))


def test_float_pictures_and_lost_channel_axes() -> None:
    assert Pipeline(["ToFloat"], "augment")(PICTURES[0], 0).dtype == np.float32
    assert Pipeline([{"ToGray": {"num_output_channels": 1, "p": 1}}], "augment")(PICTURES[0], 0).shape == (48, 56, 1)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["HorizontalFlop"], r"data\.augment\[0\]: .* no transform 'HorizontalFlop', did you mean 'HorizontalFlip'"),
        (["NoOp", "randomcrop"], r"augment\[1\]: .* did you mean 'RandomCrop'"),
        (["BboxParams"], r"no transform 'BboxParams'"),
        ([{"HorizontalFlip": {"prob": 0.5}}], r"\[0\]\.HorizontalFlip: unknown argument 'prob'.*; there are: p"),
        ([{"ColorJitter": {"brightnes": 0.5}}], r"unknown argument 'brightnes', did you mean 'brightness'"),
        ([{"HorizontalFlip": {"p": 3}}], r"\[0\]\.HorizontalFlip: p: Input should be less than or equal to 1"),
        ([{"RandomResizedCrop": {"size": 224}}], r"RandomResizedCrop: size: "),
        ([{"RandomCrop": {"height": 8}}], r"RandomCrop: width: Field required"),
        (
            [{"OneOf": {"transforms": ["Blur", "Blurr"]}}],
            r"\[0\]\.OneOf\.transforms\[1\]: .*'Blurr', did you mean 'Blur'",
        ),
        (
            [{"Resize": {"height": 8, "width": 8, "interpolation": "cv2.INTER_FOO"}}],
            r"Resize\.interpolation: .*INTER_FOO",
        ),
        ([{"A": {}, "B": {}}], r"\[0\]: expected a transform"),
        ([3], r"\[0\]: expected a transform"),
        ([{"HorizontalFlip": 0.5}], r"\[0\]: expected a transform"),
        (["ToTensorV2"], r"\[0\]\.ToTensorV2: leave it out"),
        (["MaskDropout"], r"MaskDropout: needs mask"),
        ([{"Lambda": {"image": "os.system"}}], r"\[0\]\.Lambda: takes Python functions"),
    ],
)
def test_mistakes_are_named(entries: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Pipeline(entries, "data.augment")(PICTURES[0], 0)


def test_a_picture_that_a_transform_refuses_is_bad() -> None:
    crop = Pipeline([{"RandomCrop": {"height": 50, "width": 50}}], "data.augment")
    assert crop(PICTURES[3], 0).shape == (50, 50, 3)
    with pytest.raises(UnreadableImage, match=r"data\.augment: "):
        crop(PICTURES[0], 0)


def test_a_result_that_is_no_picture() -> None:
    sixteen_bits = Pipeline(["ToFloat", {"FromFloat": {"dtype": "uint16"}}], "data.augment")
    with pytest.raises(UserError, match=r"data\.augment: gives uint16 \[48, 56, 3\]"):
        sixteen_bits(PICTURES[0], 0)

"""Clients' samples: what is taken, what is refused, and that pictures come out as in training."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.vision.augment import Pipeline
from recipes.vision.folder import View
from serving import inputs
from serving.errors import BadBundle, BadInput, ServingError
from serving.inputs import Encoded
from serving.signature import Field, Signature

EMPTY = Signature((), ())


def pictures(**spec: Any) -> Any:
    whole = {"kind": "picture", "channels": 1, "height": 2, "width": 3, "resize": "none", **spec}
    return inputs.load(whole, EMPTY)


def tensors(*fields: Field) -> Any:
    return inputs.load({"kind": "tensor"}, Signature(fields, ()))


def test_pixels_come_through() -> None:
    found = pictures()
    (array,) = found.prepare(found.parse([[0, 1, 2], [3, 4, 255]], "x"))
    assert array.tolist() == [[[0, 1, 2], [3, 4, 255]]] and array.dtype == np.uint8


def test_grey_pixels_are_repeated_for_a_model_of_colours() -> None:
    found = pictures(channels=3)
    (array,) = found.prepare(found.parse([[0, 1, 2], [3, 4, 255]], "x"))
    assert array.shape == (3, 2, 3) and (array == array[:1]).all()


def test_a_colour_picture_keeps_its_channels_innermost_in_memory() -> None:
    found = pictures(channels=3)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 3), np.uint8)
    (array,) = found.prepare(found.parse(pixels.tolist(), "x"))
    assert (array == pixels.transpose(2, 0, 1)).all() and array.transpose(1, 2, 0).flags.c_contiguous


@pytest.mark.parametrize(
    ("instance", "said"),
    [
        ([[0, 1, 2]], r"shape \[1, 3\]; expected pixels \[2, 3\]"),
        ([[0, 1], [2]], "rows of different lengths"),
        ([[0, 1, 256], [0, 0, 0]], "pixel value 256; expected 0 to 255"),
        ([[0, -1, 2], [0, 0, 0]], "pixel value -1"),
        ([[0, 1.5, 2], [0, 0, 0]], "no whole number"),
        ([[0, True, 2], [0, None, 0]], "no whole number"),
        ([["0", "1", "2"], ["0", "0", "0"]], "no whole number"),
        ([[0, 10**30, 2], [0, 0, 0]], "no whole number"),
        ([], "no whole number|shape"),
        ([[], []], "no whole number|shape"),
        (7, "got a number"),
        (None, "got null"),
        ("abc", "got a text"),
        ({}, "an object with nothing in it"),
        ({"b64": 1}, "an object with 'b64'"),
        ({"b64": "aGk=", "more": 1}, "an object with 'b64', 'more'"),
        ({"b64": "!!"}, "no base64"),
        ({"b64": ""}, "is empty"),
    ],
)
def test_what_is_no_picture(instance: Any, said: str) -> None:
    with pytest.raises(BadInput, match=said) as told:
        pictures().parse(instance, "instances[3]")
    assert told.value.field.startswith("instances[3]") and "\n" not in str(told.value)


def test_bytes_that_are_no_picture_are_found_when_they_are_decoded() -> None:
    found = pictures()
    sample = found.parse({"b64": b64encode(b"not a picture").decode()}, "instances[0]")
    with pytest.raises(BadInput, match=r"instances\[0\]\.b64: cannot be decoded") as told:
        found.prepare(sample)
    assert told.value.is_undecodable


def test_a_picture_of_another_size_is_refused_where_nothing_scales_it() -> None:
    found = pictures()
    _, data = cv2.imencode(".png", np.zeros((4, 4), np.uint8))
    with pytest.raises(BadInput, match=r"ends as uint8 \[4, 4, 1\]; the model takes uint8 \[2, 3, 1\]"):
        found.prepare(found.parse_bytes(data.tobytes(), "body"))


@pytest.mark.parametrize("transform", [None, [{"Resize": {"height": 40, "width": 50}}, "ToGray", {"Normalize": {}}]])
@pytest.mark.parametrize("channels", [1, 3])
def test_files_come_out_as_in_training(transform: list[Any] | None, channels: int) -> None:
    """The same bits as the data set's own view of the same file, for sizes and shapes of all kinds."""
    if transform and channels == 1:
        transform = transform[:1]
    pipeline = Pipeline(transform, "data.transform") if transform else None
    size = None if pipeline else (24, 20)
    view = View(pipeline, size, 1.0 if pipeline else 0.875)
    draw = np.random.default_rng(3)
    for height, width in ((1, 1), (7, 300), (24, 20), (64, 64), (301, 97)):
        _, data = cv2.imencode(".jpg", draw.integers(0, 256, (height, width, 3), np.uint8))
        from serving.pictures import decode

        wanted = view(decode(data.tobytes(), channels), seed=5)
        spec = {
            "channels": channels,
            "height": wanted.shape[0],
            "width": wanted.shape[1],
            "resize": "none" if pipeline else "crop",
            "fraction": view.fraction,
            "dtype": str(wanted.dtype),
            "transform": pipeline.serialised() if pipeline else None,
        }
        found = pictures(**spec)
        (array,) = found.prepare(Encoded(data.tobytes(), "x"))
        assert np.array_equal(array, wanted.transpose(2, 0, 1))


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=12,
    )
)
def test_anything_is_taken_or_refused(instance: Any) -> None:
    for found in (pictures(), tensors(Field("x", "float32", (-1, 2))), tensors(Field("n", "int8", (-1,)))):
        try:
            found.parse(instance, "x")
        except BadInput as error:
            assert "\n" not in str(error)


def test_tensors_by_type() -> None:
    field = Field("x", "float32", (-1, 2))
    (array,) = tensors(field).parse([1, 2.5], "x")
    assert array.dtype == np.float32 and array.tolist() == [1.0, 2.5]
    (number,) = tensors(Field("n", "int64", (-1,))).parse(-(2**63), "x")
    assert number.shape == () and int(number) == -(2**63)
    (ragged,) = tensors(Field("ids", "int64", (-1, -1))).parse([1, 2, 3], "x")
    assert ragged.shape == (3,)
    (flag,) = tensors(Field("b", "bool", (-1, 1))).parse([True], "x")
    assert flag.tolist() == [True]


@pytest.mark.parametrize(
    ("dtype", "instance", "said"),
    [
        ("float32", [1.0], r"shape \[1\]; expected float32 \[2\]"),
        ("float32", [1.0, float("nan")], "NaN"),
        ("float32", [1.0, 1e39], "out of range"),
        ("float32", [1.0, "2"], "no number"),
        ("float32", [True, False], "no number"),
        ("int8", [1, 128], "out of range"),
        ("int8", [1, 2.5], "no whole number"),
        ("uint8", [1, -1], "out of range"),
        ("int64", [1, 2**63], "out of range|no whole number"),
        ("bool", [1, 0], "true or false"),
    ],
)
def test_what_is_no_such_tensor(dtype: str, instance: Any, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        tensors(Field("x", dtype, (-1, 2))).parse(instance, "x")


def test_several_tensors_are_an_object() -> None:
    found = tensors(Field("a", "float32", (-1,)), Field("b", "int64", (-1, 1)))
    a, b = found.parse({"b": [2], "a": 1.5}, "x")
    assert (float(a), b.tolist()) == (1.5, [2])
    with pytest.raises(BadInput, match="expected an object with a, b"):
        found.parse({"a": 1}, "x")
    with pytest.raises(BadInput) as told:
        found.parse({"a": 1, "b": ["x"]}, "instances[2]")
    assert told.value.field == "instances[2].b"


def test_unknown_kinds_are_told() -> None:
    with pytest.raises(ServingError, match="unknown 'video'"):
        inputs.load({"kind": "video"}, EMPTY)
    with pytest.raises(BadBundle, match="preprocessing"):
        pictures(colour="red")

"""Numbers as they are: nested lists of one sample, or an object of them where the program takes several tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.errors import BadInput
from serving.inputs import Arrays, Encoded
from serving.signature import Field, Signature

_WHOLE = {"uint8", "int8", "int16", "int32", "int64"}


class TensorInput:
    """Parses tensors by the bundle's signature."""

    def __init__(self, fields: tuple[Field, ...]) -> None:
        self._fields = fields

    def parse(self, instance: Any, where: str) -> Arrays:
        if len(self._fields) == 1:
            return (to_array(instance, self._fields[0], where),)
        names = [field.name for field in self._fields]
        if not isinstance(instance, dict) or instance.keys() != set(names):
            raise BadInput(where, f"expected an object with {', '.join(names)}")
        return tuple(to_array(instance[field.name], field, f"{where}.{field.name}") for field in self._fields)

    def parse_bytes(self, data: bytes, where: str) -> Encoded:
        raise BadInput(where, "this model takes JSON, not the bytes of a file")

    def prepare(self, sample: Encoded | Arrays) -> Arrays:
        assert not isinstance(sample, Encoded)
        return sample

    def schema(self) -> dict[str, Any]:
        parts = {field.name: _schema(field) for field in self._fields}
        if len(parts) == 1:
            return next(iter(parts.values()))
        return {"type": "object", "properties": parts, "required": list(parts), "additionalProperties": False}


def build(spec: Mapping[str, Any], signature: Signature) -> TensorInput:
    return TensorInput(signature.inputs)


def to_array(value: Any, field: Field, where: str) -> NDArray[Any]:
    """`value`, nested lists of one sample, as an array of the field's type and shape. Raises BadInput."""
    try:
        array = numbers(value, field.dtype)
    except (ValueError, OverflowError) as error:
        raise BadInput(where, f"lists of different lengths; expected {expected(field)}") from error
    return check_array(array, field, where)


def numbers(value: Any, dtype: str) -> NDArray[Any]:
    """Nested lists as numpy reads them; but for a whole type, 3.0 is the whole number that it is in JSON.

    Raises ValueError, OverflowError, TypeError: what numpy raises.
    """
    array = np.array(value)
    if dtype not in _WHOLE or array.dtype.kind != "f":
        return array
    # Not from `array`: a float has not all whole numbers, and one float among them makes floats of all.
    items = np.array(value, dtype=object)
    whole = [int(item) if isinstance(item, float) and item.is_integer() else item for item in items.ravel()]
    return np.array(whole).reshape(items.shape)


def check_array(array: NDArray[Any], field: Field, where: str) -> NDArray[Any]:
    """One sample's array in the field's type, without loss; -1 after the batch fits any size. Raises BadInput."""
    wanted = field.shape[1:]
    fits = len(array.shape) == len(wanted) and all(w in (-1, size) for w, size in zip(wanted, array.shape, strict=True))
    if not fits:
        raise BadInput(where, f"shape {list(array.shape)}; expected {expected(field)}")
    if field.dtype == "bool":
        if array.dtype.kind != "b" and array.size:
            raise BadInput(where, f"expected true or false in {expected(field)}")
    elif array.dtype.kind not in ("iu" if field.dtype in _WHOLE else "iuf") and array.size:
        raise BadInput(
            where, f"holds what is no {'whole ' if field.dtype in _WHOLE else ''}number; expected {expected(field)}"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        result = array.astype(field.dtype)
    if field.dtype in _WHOLE and array.size and not np.array_equal(result, array):
        raise BadInput(where, f"holds a number out of range; expected {expected(field)}")
    if result.dtype.kind == "f" and not np.isfinite(result).all():
        raise BadInput(where, f"holds NaN, an infinity, or a number out of range; expected {expected(field)}")
    return result


def expected(field: Field) -> str:
    """The field in a few words."""
    shape = ", ".join("any" if size == -1 else str(size) for size in field.shape[1:])
    return f"{field.dtype} [{shape}]" if shape else f"one {field.dtype}"


def _schema(field: Field) -> dict[str, Any]:
    if field.dtype == "bool":
        found: dict[str, Any] = {"type": "boolean"}
    elif field.dtype in _WHOLE:
        info = np.iinfo(field.dtype)
        found = {"type": "integer", "minimum": int(info.min), "maximum": int(info.max)}
    else:
        largest = float(np.finfo(field.dtype).max)
        found = {"type": "number", "minimum": -largest, "maximum": largest}
    for size in reversed(field.shape[1:]):
        found = {"type": "array", "items": found, **({} if size == -1 else {"minItems": size, "maxItems": size})}
    if field.unit or field.description:
        found["description"] = ", ".join(part for part in (field.description, field.unit) if part)
    return found

"""`POST /predict`: JSON instances or a picture's bytes in, predictions out."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from serving.errors import BadInput
from serving.front.http import JSON, Request, Response
from serving.front.refusal import Refusal
from serving.front.served import Codec

WHOLE_BODY = "body"
MOST_TOP = 1 << 31
_BYTES = (b"image/", b"application/octet-stream")


class Parameters(msgspec.Struct):
    """Vertex AI's place for options; others' keys in it are left alone."""

    top: int | float | None = None


class Body(msgspec.Struct, forbid_unknown_fields=True):
    """A request in JSON."""

    instances: list[Any]
    top: int | float | None = None
    """To JSON, 3.0 is as whole as 3."""
    parameters: Parameters | None = None


class Asked(msgspec.Struct):
    """A request, parsed."""

    samples: list[Any]
    top: int | None = None


_decode = msgspec.json.Decoder(Body).decode
_encode = msgspec.json.Encoder().encode


def check_type(request: Request) -> None:
    """Raises Refusal 415 for a body that is neither JSON nor a picture's bytes."""
    content_type = request.headers.get(b"content-type")
    if content_type is None or content_type == JSON or is_bytes(content_type) or is_json(content_type):
        return
    shown = content_type[:60].decode("latin-1")
    raise Refusal(415, f"Content-Type {shown!r}: send application/json, image/*, or application/octet-stream")


def is_json(content_type: bytes) -> bool:
    return content_type.partition(b";")[0].strip().lower() == JSON


def is_bytes(content_type: bytes) -> bool:
    return content_type.lower().startswith(_BYTES)


def parse(request: Request, codec: Codec, most: int) -> Asked:
    """The samples of a request. Raises Refusal or BadInput.

    Args:
        most: instances that one request may have.
    """
    content_type = request.headers.get(b"content-type", JSON)
    if content_type != JSON and is_bytes(content_type):
        if not codec.takes_pictures:
            raise Refusal(415, "this model takes no pictures: send application/json")
        return Asked([codec.input.parse_bytes(request.body, WHOLE_BODY)])
    body: Body = decode(_decode, request.body)
    instances = body.instances
    if not instances:
        raise Refusal(400, "is empty; expected at least one instance", "instances")
    if len(instances) > most:
        raise Refusal(413, f"{len(instances)} instances; at most {most} in one request", "instances")
    given = [body.top, body.parameters.top if body.parameters is not None else None]
    tops = [_whole(value) for value in given if value is not None]  # both are looked at, the first one counts
    single = codec.input.parse
    samples = [parse_one(single, instance, f"instances[{i}]") for i, instance in enumerate(instances)]
    return Asked(samples, tops[0] if tops else None)


def _whole(top: int | float) -> int:
    if not 1 <= top <= MOST_TOP or top % 1:
        raise Refusal(400, f"{top}; expected a whole number from 1 to {MOST_TOP}", "top")
    return int(top)


def parse_one(single: Any, instance: Any, where: str) -> Any:
    """One sample; what numpy makes of odd nestings is told like any other bad input."""
    try:
        return single(instance, where)
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        raise BadInput(where, f"can't be read as numbers ({type(error).__name__})") from error


def decode(decoder: Any, body: bytes) -> Any:
    """JSON by a msgspec decoder. Raises Refusal 400, which names the field."""
    if not body:
        raise Refusal(400, "the body is empty; expected JSON")
    try:
        return decoder(body)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `")
        raise Refusal(400, message, path.rstrip("`").removeprefix("$").removeprefix(".")) from error
    except msgspec.DecodeError as error:
        raise Refusal(400, f"the body is no JSON: {error}") from error
    except (RecursionError, UnicodeDecodeError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else "it is not UTF-8"
        raise Refusal(400, f"the body is no JSON: {why}") from error


def settle(rows: Sequence[Any], codec: Codec) -> None:
    """Raises what is wrong with the first bad row: BadInput, Failed, or Refusal for an answer that is no number."""
    for row in rows:
        if isinstance(row, Exception):
            raise row
        # The largest score is NaN where any is; asking numpy about one number or ten takes as long, so ask Python.
        finite = isfinite(row[0].max()) if codec.has_labels else all(map(_is_finite, row))
        if not finite:
            raise Refusal(500, "the model's answer holds NaN or an infinity", code="not_finite")


def render(asked: Asked, rows: Sequence[Any], codec: Codec) -> tuple[Response, list[tuple[str, float]]]:
    """(the answer, the label and score of each instance where there are labels)."""
    top, output = asked.top, codec.output
    predictions = [output.render(row, top) for row in rows]
    told = [(one["label"], one["score"]) for one in predictions] if codec.has_labels else []
    return Response(200, b"%b%b}" % (codec.answer_head, _encode(predictions)), JSON, codec.headers), told


def _is_finite(array: NDArray[Any]) -> bool:
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())

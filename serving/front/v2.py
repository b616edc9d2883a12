"""The Open Inference Protocol v2: tensors by name, in JSON or appended as raw bytes (the binary data extension)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from serving.front.http import JSON, Request, Response
from serving.front.predict import decode, is_json
from serving.front.refusal import Refusal
from serving.front.served import Codec
from serving.front.tensors import BYTES, DATATYPES, Source, pack, read_array, read_bytes
from serving.inputs.tensor import check_array
from serving.signature import Field

HEADER_LENGTH = b"inference-header-content-length"
LABEL = "label"
"""Name of an output that classifiers have beside those of their program."""


class Parameters(msgspec.Struct):
    """Those of the extensions that are offered, wherever they stand."""

    binary_data_size: int | None = None
    binary_data: bool | None = None
    binary_data_output: bool = False
    classification: Any = None


class Tensor(msgspec.Struct):
    """One input."""

    name: str
    shape: list[int]
    datatype: str
    parameters: Parameters | None = None
    data: list[Any] | None = None


class Wanted(msgspec.Struct):
    """One output that is asked for."""

    name: str
    parameters: Parameters | None = None


class Body(msgspec.Struct):
    """A request."""

    inputs: list[Tensor]
    id: str | None = None
    parameters: Parameters | None = None
    outputs: list[Wanted] | None = None


class Asked(msgspec.Struct):
    """A request, parsed."""

    samples: list[Any]
    id: str | None
    outputs: list[tuple[str, bool]]
    """(name, whether as raw bytes)."""


_decode = msgspec.json.Decoder(Body).decode
_encode = msgspec.json.Encoder().encode


def check_type(request: Request) -> None:
    """Raises Refusal 415 or 400 for a body that is in none of the protocol's two forms."""
    length = request.headers.get(HEADER_LENGTH)
    if length is not None and not (length.isdigit() and len(length) < 12):
        raise Refusal(400, "expected a number of bytes", "Inference-Header-Content-Length")
    content_type = request.headers.get(b"content-type")
    if length is None and content_type is not None and not is_json(content_type):
        raise Refusal(415, f"Content-Type {content_type[:60].decode('latin-1')!r}: send application/json")


def parse(request: Request, codec: Codec, most: int) -> Asked:
    """The samples of a request. Raises Refusal or BadInput."""
    length = request.headers.get(HEADER_LENGTH)
    head = len(request.body) if length is None else int(length)
    if head > len(request.body):
        raise Refusal(400, "is more than the body has", "Inference-Header-Content-Length")
    body: Body = decode(_decode, request.body[:head])
    source = Source(request.body, head)
    tensors = {tensor.name: (tensor, f"inputs[{i}]") for i, tensor in enumerate(body.inputs)}
    expected = [field.name for field in codec.bundle.signature.inputs]
    if sorted(tensors) != sorted(expected) or len(tensors) != len(body.inputs):
        raise Refusal(400, f"expected {', '.join(expected)}, each once", "inputs")
    for tensor, where in tensors.values():
        _check_shape(tensor, where, most)
        source.find(tensor.name, None if tensor.parameters is None else tensor.parameters.binary_data_size, where)
    source.finish()
    parse_all = _pictures if codec.takes_pictures else _arrays
    samples = parse_all([tensors[name] for name in expected], source, codec)
    return Asked(samples, body.id, _outputs(body, codec))


def render(asked: Asked, rows: Sequence[Any], codec: Codec) -> tuple[Response, list[tuple[str, float]]]:
    """(the answer, the label and score of each sample where there are labels)."""
    fields = codec.bundle.signature.outputs
    told = _labelled(rows, codec) if codec.has_labels else []
    found: dict[str, NDArray[Any]] = {}
    for position, field in enumerate(fields):
        found[field.name] = np.stack([row[position] for row in rows])
    if told:
        found.setdefault(LABEL, np.array([label for label, _ in told], dtype=object))
    outputs, blobs = [], []
    for name, is_binary in asked.outputs:
        array = found[name]
        datatype = BYTES if array.dtype == object else DATATYPES[array.dtype.name]
        output: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        if is_binary:
            blobs.append(pack(array))
            output["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            output["data"] = array.ravel().tolist()
        outputs.append(output)
    bundle = codec.bundle
    content = {"model_name": codec.name, "model_version": bundle.version, "outputs": outputs}
    head = _encode(content if asked.id is None else {**content, "id": asked.id})
    if not blobs:
        return Response(200, head, JSON, codec.headers), told
    headers = codec.headers + b"inference-header-content-length: %d\r\n" % len(head)
    return Response(200, b"".join([head, *blobs]), b"application/octet-stream", headers), told


def metadata(codec: Codec) -> dict[str, Any]:
    """What a client has to send, and what it gets."""
    bundle = codec.bundle
    outputs = [_told(field) for field in bundle.signature.outputs]
    if codec.has_labels and all(output["name"] != LABEL for output in outputs):
        outputs.append({"name": LABEL, "datatype": BYTES, "shape": [-1]})
    if codec.takes_pictures:
        inputs = [{"name": bundle.signature.inputs[0].name, "datatype": BYTES, "shape": [-1]}]
    else:
        inputs = [_told(field) for field in bundle.signature.inputs]
    return {
        "name": codec.name,
        "versions": [bundle.version],
        "platform": f"trainer_{bundle.program.runtime}",
        "inputs": inputs,
        "outputs": outputs,
    }


def _told(field: Field) -> dict[str, Any]:
    return {"name": field.name, "datatype": DATATYPES[field.dtype], "shape": list(field.shape)}


def _check_shape(tensor: Tensor, where: str, most: int) -> None:
    shape = tensor.shape
    if not shape or any(size < 0 for size in shape) or math.prod(shape) > 1 << 40:
        raise Refusal(400, f"{str(shape)[:100]}; expected sizes, the first of them the batch's", f"{where}.shape")
    if shape[0] < 1:
        raise Refusal(400, "the batch is empty; expected at least one", f"{where}.shape")
    if shape[0] > most:
        raise Refusal(413, f"a batch of {shape[0]}; at most {most} in one request", f"{where}.shape")


def _arrays(tensors: list[tuple[Tensor, str]], source: Source, codec: Codec) -> list[Any]:
    columns = []
    for (tensor, where), field in zip(tensors, codec.bundle.signature.inputs, strict=True):
        datatype = DATATYPES[field.dtype]
        if tensor.datatype != datatype:
            raise Refusal(400, f"{tensor.datatype[:20]!r}; expected {datatype}", f"{where}.datatype")
        wanted = field.shape[1:]
        fits = len(tensor.shape) == len(wanted) + 1 and all(
            size in (-1, given) for size, given in zip(wanted, tensor.shape[1:], strict=True)
        )
        if not fits:
            raise Refusal(400, f"{tensor.shape}; expected {list(field.shape)}, -1 being the batch", f"{where}.shape")
        array = read_array(tensor.name, tensor.shape, field.dtype, tensor.data, source, where)
        # The batch is checked as one sample of one more dimension.
        batch = Field(field.name, field.dtype, (-1, *field.shape))
        columns.append(check_array(array, batch, f"{where}.data"))
    if len({len(column) for column in columns}) > 1:
        raise Refusal(400, "the inputs differ in the batch, their first size", "inputs")
    return list(zip(*columns, strict=True))


def _pictures(tensors: list[tuple[Tensor, str]], source: Source, codec: Codec) -> list[Any]:
    (tensor, where) = tensors[0]
    kind = codec.input
    if tensor.datatype == BYTES:
        if math.prod(tensor.shape) != tensor.shape[0]:
            raise Refusal(400, f"{tensor.shape}; expected [batch], a picture's file in each", f"{where}.shape")
        binary = source.part(tensor.name)
        if binary is not None:
            files = read_bytes(binary, tensor.shape[0], where)
            return [kind.parse_bytes(file, f"{where}.data[{i}]") for i, file in enumerate(files)]
        data = _flat(tensor.data, where)
        if len(data) != tensor.shape[0]:
            raise Refusal(400, f"{len(data)} elements; the shape says {tensor.shape[0]}", f"{where}.data")
        return [kind.parse({"b64": text}, f"{where}.data[{i}]") for i, text in enumerate(data)]
    if tensor.datatype != "UINT8" or len(tensor.shape) not in (3, 4):
        what = "expected BYTES [batch], a picture's file in each, or UINT8 [batch, height, width(, channels)]"
        raise Refusal(400, f"{tensor.datatype[:20]} {tensor.shape}; {what}", where)
    array = read_array(tensor.name, tensor.shape, "uint8", tensor.data, source, where)
    pixels = check_array(array, Field("", "uint8", (-1,) * (array.ndim + 1)), f"{where}.data")
    return [kind.check_pixels(one, f"{where}.data[{i}]") for i, one in enumerate(pixels)]  # type: ignore[attr-defined]


def _flat(data: list[Any] | None, where: str) -> list[Any]:
    if data is None:
        raise Refusal(400, "is missing", f"{where}.data")
    return [item for part in data for item in (part if isinstance(part, list) else [part])]


def _outputs(body: Body, codec: Codec) -> list[tuple[str, bool]]:
    known = [field.name for field in codec.bundle.signature.outputs]
    if codec.has_labels and LABEL not in known:
        known.append(LABEL)
    all_binary = body.parameters is not None and body.parameters.binary_data_output
    if not body.outputs:
        return [(name, all_binary) for name in known]
    found = []
    for i, wanted in enumerate(body.outputs):
        if wanted.name not in known:
            raise Refusal(400, f"{wanted.name[:100]!r}; there are: {', '.join(known)}", f"outputs[{i}].name")
        parameters = wanted.parameters
        if parameters is not None and parameters.classification is not None:
            raise Refusal(400, "this extension is not offered", f"outputs[{i}].parameters.classification")
        own = None if parameters is None else parameters.binary_data
        found.append((wanted.name, all_binary if own is None else own))
    return found


def _labelled(rows: Sequence[Any], codec: Codec) -> list[tuple[str, float]]:
    labels = codec.bundle.signature.labels or ()
    best = [int(row[0].argmax()) for row in rows]
    return [(labels[index], float(row[0][index])) for index, row in zip(best, rows, strict=True)]

"""The Open Inference Protocol's part of the OpenAPI document."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from serving.front import v2
from serving.front.hello import golden
from serving.front.schemas import Json, answers, closed, operation, parameter, reference
from serving.front.served import Codec, in_path
from serving.front.tensors import BYTES, DATATYPES
from serving.signature import Field

if TYPE_CHECKING:
    from serving.front.served import Served

LARGEST_EXAMPLE = 20_000
_TENSOR = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "datatype": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "parameters": {"type": "object"},
        "data": {"type": "array"},
    },
    "required": ["name", "datatype", "shape"],
}
_TOLD = closed(
    {
        "name": {"type": "string"},
        "datatype": {"enum": [BYTES, *DATATYPES.values()]},
        "shape": {"type": "array", "items": {"type": "integer"}},
    }
)
_TOLD_ALL = {"type": "array", "items": _TOLD}
SCHEMAS: Json = {
    "OpenInferenceError": closed({"error": {"type": "string"}}),
    "OpenInferenceMetadata": closed(
        {
            "name": {"type": "string"},
            "versions": {"type": "array", "items": {"type": "string"}},
            "platform": {"type": "string"},
            "inputs": _TOLD_ALL,
            "outputs": _TOLD_ALL,
        }
    ),
    "OpenInferenceAnswer": closed(
        {
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "id": {"type": "string"},
            "outputs": {"type": "array", "items": _TENSOR},
        },
        ["model_name", "model_version", "outputs"],
    ),
}
_ERROR = reference("OpenInferenceError")
TAG = "Open Inference Protocol v2"
_TAG = {"tags": [TAG]}
_OPEN = {**_TAG, "x-open": True}


def server_paths(served: Served) -> Json:
    """Those without a model in them."""
    flag = {"type": "boolean"}
    ready = closed({"ready": flag})
    server = closed(
        {
            "name": {"type": "string"},
            "version": {"type": "string"},
            "extensions": {"type": "array", "items": {"type": "string"}},
        }
    )
    row = closed({key: {"type": "string"} for key in ("name", "version", "state", "reason")})
    index = operation("v2_index", "All models", {"200": ("Each with its state.", {"type": "array", "items": row})})
    index["requestBody"] = _optional({"type": "object", "properties": {"ready": flag}})
    index["responses"] |= answers(_ERROR, 400, 401, 413, 415, 429, 503)
    live = operation("v2_live", "Lives", {"200": ("It does.", closed({"live": flag}))})
    both = {"200": ("It is.", ready), "503": ("It is not.", ready)}
    return {
        "/v2": {"get": {**operation("v2_server", "About the server", {"200": ("It.", server)}), **_OPEN}},
        "/v2/health/live": {"get": {**live, **_OPEN}},
        "/v2/health/ready": {"get": {**operation("v2_ready", "All models are ready", both), **_OPEN}},
        "/v2/repository/index": {"post": {**index, **_TAG}},
    }


def model_paths(codec: Codec, position: int, most: int) -> Json:
    """Those of one model, with and without its version."""
    base = f"/v2/models/{in_path(codec.name)}"
    found: Json = {}
    for path, suffix in ((base, ""), (f"{base}/versions/{codec.bundle.version}", "_version")):
        found[path] = {"get": _metadata(f"v2_metadata_{position}{suffix}")}
        found[f"{path}/ready"] = {"get": _ready(f"v2_model_ready_{position}{suffix}")}
        found[f"{path}/infer"] = {"post": _infer(codec, f"v2_infer_{position}{suffix}", most)}
    loaded = closed({"name": {"type": "string"}, "version": {"type": "string"}})
    load = operation(f"v2_load_{position}", "Load it again from its folder", {"200": ("What is served now.", loaded)})
    load["requestBody"] = _optional(
        {"type": "object", "properties": {"parameters": {"type": ["object", "null"], "maxProperties": 0}}}
    )
    load["responses"] |= answers(_ERROR, 400, 401, 403, 404, 409, 413, 415, 429, 500, 503)
    found[f"/v2/repository/models/{in_path(codec.name)}/load"] = {"post": {**load, **_TAG}}
    return found


def _optional(schema: Json) -> Json:
    return {"required": False, "content": {"application/json": {"schema": schema}}}


def _metadata(name: str) -> Json:
    about = {"200": ("It.", reference("OpenInferenceMetadata"))}
    found = operation(name, "About a model", about)
    found["responses"] |= answers(_ERROR, 401, 404, 429, 503)
    return {**found, **_TAG}


def _ready(name: str) -> Json:
    state = closed({"name": {"type": "string"}, "ready": {"type": "boolean"}})
    found = operation(name, "A model is ready", {"200": ("It is.", state), "503": ("It is not.", state)})
    found["responses"] |= answers(_ERROR, 404)
    return {**found, **_OPEN}


def _infer(codec: Codec, name: str, most: int) -> Json:
    found = operation(name, f"Predict with {codec.name}", {"200": ("Outputs.", reference("OpenInferenceAnswer"))})
    found["parameters"] = [parameter("X-Deadline-Ms"), parameter("X-Request-Id")]
    binary = "raw bytes after the JSON: the binary data extension"
    found["description"] = f"At most {most} samples in one request. Inputs may also come as {binary}."
    content: Json = {"schema": _request(codec)}
    example = _example(codec)
    if len(str(example)) < LARGEST_EXAMPLE:
        content["examples"] = {"golden": {"summary": "a golden request", "value": example}}
    found["requestBody"] = {"required": True, "content": {"application/json": content}}
    found["responses"] |= answers(_ERROR, 400, 401, 404, 411, 413, 415, 422, 429, 500, 503, 504)
    return {**found, **_TAG}


def _request(codec: Codec) -> Json:
    """What a client may send for one sample, and the forms of the rest: a batch of one is all that a schema can say."""
    inputs = [_pictures(codec)] if codec.takes_pictures else [_input(field) for field in codec.bundle.signature.inputs]
    count = len(inputs)
    names = [output["name"] for output in v2.metadata(codec)["outputs"]]
    wanted = {
        "type": "array",
        "items": {"type": "object", "properties": {"name": {"enum": names}}, "required": ["name"]},
    }
    listed: Json = {"type": "array", "prefixItems": inputs, "items": False, "minItems": count, "maxItems": count}
    if count == 1:
        listed = {"type": "array", "items": inputs[0], "minItems": 1, "maxItems": 1}
    return {
        "type": "object",
        "properties": {"id": {"type": "string"}, "inputs": listed, "outputs": wanted},
        "required": ["inputs"],
    }


def _input(field: Field) -> Json:
    shape = [1, *(1 if size == -1 else size for size in field.shape[1:])]
    count = int(np.prod(shape))
    return closed(
        {
            "name": {"const": field.name},
            "datatype": {"const": DATATYPES[field.dtype]},
            "shape": {"const": shape},
            "data": {"type": "array", "items": number(field.dtype), "minItems": count, "maxItems": count},
        }
    )


def _pictures(codec: Codec) -> Json:
    text = {"type": "string", "format": "byte", "description": "a picture's file, base64"}
    name = {"name": {"const": codec.bundle.signature.inputs[0].name}}
    data = {"type": "array", "items": text, "minItems": 1, "maxItems": 1}
    forms = [closed({**name, "datatype": {"const": BYTES}, "shape": {"const": [1]}, "data": data})]
    spec = codec.bundle.preprocessing
    if spec["resize"] == "none" and spec.get("transform") is None:
        count = spec["height"] * spec["width"]
        data = {"type": "array", "items": number("uint8"), "minItems": count, "maxItems": count}
        shape = {"const": [1, spec["height"], spec["width"]]}
        forms.append(closed({**name, "datatype": {"const": "UINT8"}, "shape": shape, "data": data}))
    return {"anyOf": forms} if len(forms) > 1 else forms[0]


def number(dtype: str) -> Json:
    """One number of a type."""
    if dtype == "bool":
        return {"type": "boolean"}
    if dtype.startswith("float"):
        largest = float(np.finfo(dtype).max)
        return {"type": "number", "minimum": -largest, "maximum": largest}
    info: Any = np.iinfo(dtype)
    return {"type": "integer", "minimum": int(info.min), "maximum": int(info.max)}


def _example(codec: Codec) -> Json:
    """The first golden request in the protocol's words."""
    request = golden(codec.bundle)
    fields = codec.bundle.signature.inputs
    if not codec.takes_pictures:
        values = [request] if len(fields) == 1 else [request[field.name] for field in fields]
        return {"inputs": [_tensor(f, np.array(v)) for f, v in zip(fields, values, strict=True)]}
    if isinstance(request, dict):
        return {"inputs": [{"name": fields[0].name, "datatype": BYTES, "shape": [1], "data": [request["b64"]]}]}
    pixels = np.array(request, np.uint8)
    return {"inputs": [{**_tensor(fields[0], pixels), "datatype": "UINT8"}]}


def _tensor(field: Field, array: Any) -> Json:
    return {
        "name": field.name,
        "datatype": DATATYPES[field.dtype],
        "shape": [1, *array.shape],
        "data": array.ravel().tolist(),
    }

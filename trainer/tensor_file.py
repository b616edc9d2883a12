"""Writing safetensors files in one pass: no copy of the data, sha256 on the way, the GIL left to the training.

`safetensors.torch.save_file` turns each tensor into a bytes object under the GIL, which stalls the training thread.
Format: 8 bytes little-endian header length, JSON header, data (github.com/huggingface/safetensors, README).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from trainer.files import to_disk

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK = 8 << 20


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, object]:
    """Write CPU tensors to `path`, durably; returns `sha256` (hex) and `size` (bytes) for the manifest."""
    header: dict[str, object] = {}
    # Widest first, so that every tensor starts at a multiple of its element size, as readers that map the file want.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for data in [memoryview(len(text).to_bytes(8, "little") + text), *(_bytes(tensors[name]) for name in names)]:
            for start in range(0, len(data), _CHUNK):
                chunk = data[start : start + _CHUNK]
                digest.update(chunk)
                while len(chunk):
                    chunk = chunk[file.write(chunk) :]
        to_disk(file.fileno())
        size = file.tell()
    return {"sha256": digest.hexdigest(), "size": size}


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data

"""Our one-pass writer of safetensors against the library's reader."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from trainer.tensor_file import _DTYPES, write_tensors


def test_every_dtype_and_shape_comes_back(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype in _DTYPES:
        for shape in ((), (0,), (3,), (2, 0, 4), (5, 7)):
            values = torch.randint(0, 2, shape, generator=draw) if dtype == torch.bool else None
            base = values if values is not None else torch.randint(-100, 100, shape, generator=draw)
            tensors[f"{dtype}{shape}"] = base.to(dtype)
    tensors["transposed"] = torch.randn(4, 6, generator=draw).t()
    tensors["strided"] = torch.randn(10, generator=draw)[::3]
    entry = write_tensors(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    data = (tmp_path / "x.safetensors").read_bytes()
    assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def test_no_tensor_at_all(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", {})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert list(file.keys()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode()}")
    try:
        with pytest.raises(OSError, match="No space left"):
            write_tensors(small / "x.safetensors", {"x": torch.zeros(1 << 20)})
    finally:
        subprocess.run(["umount", str(small)], check=True)

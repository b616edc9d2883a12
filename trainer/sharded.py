"""Sharded checkpoints by torch's distributed checkpoint (DCP), loadable with any number of processes.

DCP keeps its table of contents as a pickle. It is read here by an unpickler that knows the few classes of that
table and nothing else, after its hash was checked.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from trainer.checkpoint import DamagedCheckpoint, hash_file
from trainer.engine import Engine
from trainer.errors import TrainerError
from trainer.state import Tensors

_ALLOWED = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("torch.serialization", "_get_layout"),
    *(("torch", name) for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")),
}


class _TableUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise DamagedCheckpoint(f"the table of contents of a sharded checkpoint names {module}.{name}: refused")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata: Metadata = _TableUnpickler(file).load()
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        for name, entry in metadata.state_dict_metadata.items():
            # Anything but a tensor would be unpickled by DCP's planner; we write tensors only.
            if not isinstance(entry, TensorStorageMetadata):
                raise DamagedCheckpoint(f"{self.path}: {name} is no tensor: refused")
        return metadata


def save(folder: Path, tensors: Tensors, group: Any) -> dict[str, dict[str, Any]]:
    """Every rank writes its part; rank 0 gets the files (relative to the checkpoint) with hash and size."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
    with _plain_errors(TrainerError, f"{folder}: could not be written"):
        dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)
    rank = dist.get_rank(group) if group is not None else 0
    mine = [path for path in folder.iterdir() if path.name.startswith(f"__{rank}_")]
    if rank == 0:
        mine.append(folder / ".metadata")
        _sync(folder / ".metadata")
    files = {f"{folder.name}/{path.name}": {"sha256": hash_file(path), "size": path.stat().st_size} for path in mine}
    if group is None:
        return files
    every_rank: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every_rank, files, group=group)
    return {name: entry for part in every_rank for name, entry in part.items()}


def load(folder: Path, engine: Engine | None) -> Tensors:
    """All tensors of a checkpoint: cut as the engine's parameters are, or whole without a sharded engine."""
    reader = _Reader(folder)
    wanted: Tensors = {}
    for key, entry in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)  # the reader refused anything else
        parameter = engine.parameter(key.split("/")[1]) if engine is not None and engine.sharded else None
        if parameter is not None and hasattr(parameter, "device_mesh") and parameter.shape == entry.size:
            wanted[key] = torch.zeros_like(parameter.detach(), dtype=entry.properties.dtype)
        else:
            wanted[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
    group = engine.control_group if engine is not None else None
    with warnings.catch_warnings(), _plain_errors(DamagedCheckpoint, f"{folder}: could not be read"):
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is meant
        dcp.load(wanted, storage_reader=reader, process_group=group, no_dist=group is None)
    return wanted


@contextmanager
def _plain_errors(kind: type[TrainerError], message: str) -> Iterator[None]:
    """DCP's own exception is no Exception, and its text is the tracebacks of all ranks: tell the first cause."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        first_line = str(cause).partition("\n")[0]
        raise kind(f"{message} (rank {rank}: {type(cause).__name__}: {first_line})") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

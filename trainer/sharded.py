"""Sharded checkpoints by torch's distributed checkpoint (DCP), loadable with any number of processes.

DCP keeps its table of contents as a pickle. It is read here by an unpickler that knows the few classes of that
table and nothing else, after its hash was checked.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from trainer.checkpoint import DamagedCheckpoint, entry
from trainer.engine import Engine
from trainer.errors import TrainerError
from trainer.files import reason, sync
from trainer.state import Tensors

T = TypeVar("T")

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


class _Writer(dcp.FileSystemWriter):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder, single_file_per_rank=True, sync_files=True)

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except RuntimeError as error:  # torch's zip writer hides what the disk said
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            try:
                metadata: Metadata = _TableUnpickler(file).load()
                assert isinstance(metadata, Metadata)
            except DamagedCheckpoint:
                raise
            except Exception as error:  # whatever a table can be that has the right hash and is none
                raise DamagedCheckpoint(f"{self.path}: no table of contents ({type(error).__name__})") from error
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        for name, item in metadata.state_dict_metadata.items():
            # Anything but a tensor would be unpickled by DCP's planner; we write tensors only.
            if not isinstance(item, TensorStorageMetadata) or "/" not in name:
                raise DamagedCheckpoint(f"{self.path}: {name} is no tensor: refused")
        return metadata


def save(folder: Path, tensors: Tensors, group: Any) -> dict[str, dict[str, Any]]:
    """Every rank writes its part; all get the files (relative to the checkpoint) with hash and size.

    What fails on one rank is raised on all of them, so that none waits for another that has given up.
    """
    together(group, lambda: _make(folder))
    with _plain_errors(TrainerError, f"{folder}: could not be written"):
        dcp.save(dict(tensors), storage_writer=_Writer(folder), process_group=group, no_dist=group is None)
    rank = dist.get_rank(group) if group is not None else 0
    every_rank = together(group, lambda: _own_files(folder, rank))
    return {name: value for part in every_rank for name, value in part.items()}


def together(group: Any, work: Callable[[], T]) -> list[T]:
    """What `work`, which concerns this process alone, returns on each rank; its error on one is raised on all."""
    if group is None:
        return [work()]
    value: T | None = None
    own: Exception | None = None
    try:
        value = work()
    except Exception as error:  # raised below, once the others know
        own = error
    answers: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(answers, (value, _as_sent(own)), group=group)
    if own is not None:
        raise own
    for _, failed in answers:
        if failed is not None:
            raise failed
    return [value for value, _ in answers]


def _as_sent(error: Exception | None) -> Exception | None:
    """An error as it travels to other ranks, which may not know its type."""
    if error is None or type(error) is TrainerError:
        return error
    if isinstance(error, OSError):
        return OSError(error.errno, reason(error), str(error.filename or ""))
    return TrainerError(f"{type(error).__name__}: {error}")


def _make(folder: Path) -> None:
    """Make the folder and the one around it: any rank may come first. Never what lies above, which may be gone."""
    folder.parent.mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)


def _own_files(folder: Path, rank: int) -> dict[str, dict[str, Any]]:
    mine = [path for path in folder.iterdir() if path.name.startswith(f"__{rank}_")]
    if rank == 0:
        mine.append(folder / ".metadata")
        sync(folder / ".metadata")
    return {f"{folder.name}/{path.name}": entry(path) for path in mine}


def load(folder: Path, engine: Engine | None) -> Tensors:
    """All tensors of a checkpoint: cut as the engine's parameters are, or whole without a sharded engine."""
    reader = _Reader(folder)
    wanted: Tensors = {}
    for key, item in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(item, TensorStorageMetadata)  # the reader refused anything else
        parameter = engine.parameter(key.split("/")[1]) if engine is not None and engine.sharded else None
        if parameter is not None and hasattr(parameter, "device_mesh") and parameter.shape == item.size:
            wanted[key] = torch.zeros_like(parameter.detach(), dtype=item.properties.dtype)
        else:
            wanted[key] = torch.empty(item.size, dtype=item.properties.dtype)
    group = engine.control_group if engine is not None else None
    with warnings.catch_warnings(), _plain_errors(DamagedCheckpoint, f"{folder}: could not be read"):
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is meant
        dcp.load(wanted, storage_reader=reader, process_group=group, no_dist=group is None)
    return wanted


@contextmanager
def _plain_errors(kind: type[TrainerError], message: str) -> Iterator[None]:
    """DCP's own exception is no Exception, and its text is the tracebacks of all ranks: tell the first cause.

    An OSError remains one where something could not be written.
    """
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        if isinstance(cause, OSError) and kind is TrainerError:
            raise OSError(cause.errno, reason(cause), str(cause.filename or "")) from error
        first_line = str(cause).partition("\n")[0]
        raise kind(f"{message} (rank {rank}: {type(cause).__name__}: {first_line})") from error

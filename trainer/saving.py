"""Saving beside the training: the training thread copies the state, another one writes, hashes and publishes it."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer import checkpoint, sharded
from trainer.checkpoint import Manifest
from trainer.config import Checkpoint as CheckpointConfig
from trainer.engine import Engine
from trainer.files import write_atomically
from trainer.state import JobState, Tensors
from trainer.tensor_file import write_tensors

SETTLE_SECONDS = 30.0
GROUPS = ("model", "optimizer", "ema", "random")


class Saver:
    """Writes the checkpoints of one run, one at a time; all ranks make one and call it alike."""

    def __init__(self, folder: Path, config: CheckpointConfig, engine: Engine) -> None:
        self.folder = folder
        self._config = config
        self._rank = engine.world.rank
        self._sharded = engine.sharded
        # Its own group: the writing threads talk to each other while the training threads do.
        self._group: Any = dist.new_group(backend="gloo") if engine.world.size > 1 else None
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        if self._rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.remove_unfinished(folder)

    def save(self, state: JobState, manifest: Manifest) -> None:
        """Copy the state and return; waits first for a checkpoint that is still being written."""
        self.wait()
        copies = {name: self._copy(name, getattr(state, name)) for name in GROUPS}
        numbers = {**state.numbers, "world_size": manifest.world_size}
        self._thread = threading.Thread(
            target=self._run, args=(copies, numbers, manifest), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Return when the last checkpoint is published; raises what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def settle(self) -> None:
        """After an error elsewhere: let a checkpoint that is being written be finished, if that is soon."""
        if self._thread is not None:
            self._thread.join(SETTLE_SECONDS)

    def _copy(self, group: str, tensors: Tensors) -> Tensors:
        """Copies on the CPU, in buffers kept from save to save: new memory costs more than the copy itself."""
        if self._rank != 0 and not (self._sharded and group != "random"):
            return {}
        copies = {}
        for name, tensor in tensors.items():
            key = f"{group}/{name}"
            kept = self._buffers.get(key)
            if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype or self._sharded:
                kept = self._buffers[key] = tensor.detach().to("cpu", copy=True)
            else:
                kept.copy_(tensor)
            copies[name] = kept
        return copies

    def _run(self, copies: dict[str, Tensors], numbers: dict[str, Any], manifest: Manifest) -> None:
        try:
            self._write(copies, numbers, manifest)
        except BaseException as error:  # raised in the training thread by `wait`
            self._error = error
            if self._rank == 0:  # a full disk has to take the record of the failure yet
                shutil.rmtree(checkpoint.unfinished_folder(self.folder, manifest.step), ignore_errors=True)

    def _write(self, copies: dict[str, Tensors], numbers: dict[str, Any], manifest: Manifest) -> None:
        target = checkpoint.unfinished_folder(self.folder, manifest.step)
        if self._rank == 0:
            target.mkdir(exist_ok=True)  # another rank may have come first
        if self._sharded:
            flat = {f"{group}/{name}": t for group in GROUPS[:3] for name, t in copies[group].items()}
            manifest.files.update(sharded.save(target / "sharded", flat, self._group))
        if self._rank == 0:
            self._publish(target, copies, numbers, manifest)
        if self._sharded and self._group is not None:
            dist.barrier(self._group)  # no rank may leave before: rank 0 would lose what it has yet to hear from it

    def _publish(self, target: Path, copies: dict[str, Tensors], numbers: dict[str, Any], manifest: Manifest) -> None:
        for group in GROUPS:
            if copies[group] and (group == "random" or not self._sharded):
                manifest.files[f"{group}.safetensors"] = write_tensors(target / f"{group}.safetensors", copies[group])
        write_atomically(target / "state.json", json.dumps(numbers).encode())
        manifest.files["state.json"] = {
            "sha256": checkpoint.hash_file(target / "state.json"),
            "size": (target / "state.json").stat().st_size,
        }
        checkpoint.publish(target, manifest)
        checkpoint.clean_up(self.folder, self._config.keep, self._config.monitor, self._config.mode)


def load(path: Path, manifest: Manifest, engine: Engine | None = None) -> JobState:
    """Read a verified checkpoint; with an engine that is sharded, each rank reads only its own part.

    Without one, as for evaluation or export, only whole tensors are returned, on the CPU.
    """
    from safetensors.torch import load_file

    numbers = json.loads((path / "state.json").read_bytes())
    groups: dict[str, Tensors] = {name: {} for name in GROUPS}
    for name in GROUPS:
        if f"{name}.safetensors" in manifest.files:
            groups[name] = load_file(path / f"{name}.safetensors")
    if manifest.sharded:
        for key, tensor in sharded.load(path / "sharded", engine).items():
            group, name = key.split("/", 1)
            groups[group][name] = tensor
    return JobState(**groups, numbers=numbers)

"""Saving beside the training: the training thread copies the state, another one writes, hashes and publishes it."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from trainer import checkpoint, sharded
from trainer.checkpoint import DamagedCheckpoint, Manifest
from trainer.config import Checkpoint as CheckpointConfig
from trainer.engine import Engine
from trainer.errors import TrainerError, UserError
from trainer.files import reason, remedy, write_atomically
from trainer.retention import clean_up
from trainer.state import JobState, Tensors
from trainer.tensor_file import write_tensors

SETTLE_SECONDS = 30.0
GROUPS = ("model", "optimizer", "ema", "random")


def _own_part(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor that this rank holds; a whole tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _to_stderr(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


class Saver:
    """Writes the checkpoints of one run, one at a time; all ranks make one and call it alike."""

    def __init__(
        self, folder: Path, config: CheckpointConfig, engine: Engine, warn: Callable[[str], None] = _to_stderr
    ) -> None:
        """`warn` is told, from the writing thread, what goes wrong without costing a checkpoint."""
        self.folder = folder
        self._config = config
        self._rank = engine.world.rank
        self._sharded = engine.sharded
        # Its own group: the writing threads talk to each other while the training threads do.
        self._group: Any = dist.new_group(backend="gloo") if engine.world.size > 1 else None
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._warn = warn
        if self._rank == 0:
            try:
                folder.mkdir(exist_ok=True)
                checkpoint.remove_unfinished(folder)
            except OSError as error:
                raise TrainerError(
                    f"{folder} can't be written ({reason(error)}); {remedy(error)} and try again"
                ) from error

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

    def check(self) -> None:
        """Raise what went wrong with the last checkpoint, where that is known by now; costs nothing."""
        if self._error is not None:
            self.wait()

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
            if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
                kept = self._buffers[key] = tensor.detach().to("cpu", copy=True)
            else:
                _own_part(kept).copy_(_own_part(tensor.detach()))
            copies[name] = kept
        return copies

    def _run(self, copies: dict[str, Tensors], numbers: dict[str, Any], manifest: Manifest) -> None:
        try:
            self._write(copies, numbers, manifest)
        except BaseException as error:  # raised in the training thread by `wait`
            if self._rank == 0:  # a full disk has to take the record of the failure yet
                shutil.rmtree(checkpoint.unfinished_folder(self.folder, manifest.step), ignore_errors=True)
            self._error = _unsaved(self.folder, manifest.step, error) if isinstance(error, OSError) else error

    def _write(self, copies: dict[str, Tensors], numbers: dict[str, Any], manifest: Manifest) -> None:
        target = checkpoint.unfinished_folder(self.folder, manifest.step)
        group = self._group if self._sharded else None  # otherwise only rank 0 has anything to write
        if self._sharded:
            flat = {f"{group}/{name}": t for group in GROUPS[:3] for name, t in copies[group].items()}
            manifest.files.update(sharded.save(target / "sharded", flat, group))
        # No rank may leave before the last is done: it would take from the others what they have yet to hear from it.
        sharded.together(group, lambda: self._publish(target, copies, numbers, manifest) if self._rank == 0 else None)

    def _publish(self, target: Path, copies: dict[str, Tensors], numbers: dict[str, Any], manifest: Manifest) -> None:
        target.mkdir(exist_ok=self._sharded)
        for group in GROUPS:
            if copies[group] and (group == "random" or not self._sharded):
                manifest.files[f"{group}.safetensors"] = write_tensors(target / f"{group}.safetensors", copies[group])
        write_atomically(target / "state.json", json.dumps(numbers).encode())
        manifest.files["state.json"] = checkpoint.entry(target / "state.json")
        checkpoint.publish(target, manifest)
        rule = self._config
        try:
            clean_up(self.folder, rule.keep, rule.monitor, rule.mode, self._warn)
        except OSError as error:  # the new one is whole: that is no reason to end
            self._warn(f"{self.folder}: an older checkpoint could not be removed ({reason(error)})")


def _unsaved(folder: Path, step: int, error: OSError) -> TrainerError:
    """What a user has to know of a checkpoint that could not be written."""
    run, name = folder.parent, checkpoint.folder_name(step)
    if not folder.is_dir():
        return TrainerError(
            f"{folder} is gone, and {name} could not be written there; put the run directory back, then: "
            f"trainer fit --resume {run}, or start a new run"
        )
    file = f": {Path(error.filename).name}" if error.filename else ""
    last = _newest(folder)
    whole = f"the last whole one is {last}" if last else "there is no whole one yet"
    return TrainerError(
        f"checkpoint {folder / name} could not be written ({reason(error)}{file}); {whole}; "
        f"{remedy(error)}, then: trainer fit --resume {run}"
    )


def _newest(folder: Path) -> str | None:
    """Name of the newest checkpoint that is whole by its looks: nothing large is read at the end of a failing run."""
    try:
        for found in reversed(checkpoint.readable(folder)):
            try:
                checkpoint.verify_sizes(found)
                return found.path.name
            except DamagedCheckpoint:
                continue
    except UserError:  # the folder can't even be listed
        pass
    return None


def load(path: Path, manifest: Manifest, engine: Engine | None = None) -> JobState:
    """Read a verified checkpoint; with an engine that is sharded, each rank reads only its own part.

    Without one, as for evaluation or export, only whole tensors are returned, on the CPU.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        numbers = json.loads((path / "state.json").read_bytes())
        _check_numbers(numbers, manifest)
        groups: dict[str, Tensors] = {name: {} for name in GROUPS}
        for name in GROUPS:
            if f"{name}.safetensors" in manifest.files:
                groups[name] = load_file(path / f"{name}.safetensors")
        if manifest.sharded:
            for key, tensor in sharded.load(path / "sharded", engine).items():
                group, name = key.split("/", 1)
                groups[group][name] = tensor
        if not groups["model"]:
            raise ValueError("no weights in it")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DamagedCheckpoint(f"{path.name} is damaged ({type(error).__name__}: {error})") from error
    return JobState(**groups, numbers=numbers)


def _check_numbers(numbers: Any, manifest: Manifest) -> None:
    """state.json and the manifest must be of one checkpoint; ValueError, KeyError or TypeError where they are not."""
    progress = numbers["progress"]
    theirs = (progress["step"], progress["consumed"], numbers["world_size"])
    if theirs != (manifest.step, manifest.consumed, manifest.world_size):
        raise ValueError("state.json is not of this checkpoint")
    if not isinstance(numbers["optimizer"], dict) or "scaler" not in numbers:
        raise ValueError("state.json has not all its parts")

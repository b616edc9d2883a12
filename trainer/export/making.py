"""The programs of a run that this machine can make, and why it can't make the others."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving import inputs
from serving.errors import BadInput
from trainer.errors import TrainerError, UserError
from trainer.export.opened import Opened
from trainer.export.programs import NotHere, Program, graph_of, int8, onnx
from trainer.export.wanted import Wanted

MADE = ("pt2", "onnx", "aoti")
SUFFIXES = {"pt2": "program.pt2", "onnx": "program.onnx", "aoti": "program.aoti.pt2"}
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_FEW = 2
"""Samples of the example: of one, torch would conclude that it is always one."""


@dataclass
class Made:
    """Programs, and the formats there are none of with the reason."""

    programs: list[Program] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


def make(opened: Opened, wanted: Wanted, indices: list[int], folder: Path, say: Callable[[str], None]) -> Made:
    """Write the programs that `wanted` asks for into `folder`.

    Raises UserError where the format that was asked for by its name can't be made here.
    """
    made = Made()
    batch, _ = opened.batch((indices * _FEW)[:_FEW])
    example = [part.contiguous() for part in opened.servable.inputs(batch)]
    graph = graph_of(opened.servable.module, example)
    for name in MADE if wanted.format == "auto" else (wanted.format,):
        say(f"making {name}")
        reason = _add(made, name, name, _dtype(opened), graph, folder / SUFFIXES[name])
        if reason and wanted.format != "auto":
            raise UserError(f"--format {name}: {reason}")
    for kind in wanted.quantise:
        say(f"making {kind}")
        reason = (_int8 if kind == "int8" else _bf16)(made, opened, wanted, example, graph, folder)
        if reason and wanted.format != "auto":
            raise UserError(f"--quantize {kind}: {reason}")
    return made


def _add(made: Made, name: str, runtime: str, dtype: str, graph: torch.export.ExportedProgram, path: Path) -> str:
    """Make one program; else say why not, and note it."""
    try:
        importlib.import_module(f"trainer.export.programs.{runtime}").write(graph, path)
    except NotHere as error:
        made.missing[name] = str(error)
        return str(error)
    made.programs.append(Program(name, runtime, path, dtype))
    return ""


def _bf16(
    made: Made,
    opened: Opened,
    wanted: Wanted,
    example: Sequence[Tensor],
    graph: torch.export.ExportedProgram,
    folder: Path,
) -> str:
    runtime = "pt2" if wanted.format == "auto" else wanted.format
    name = f"{runtime} bf16"
    if runtime == "onnx":
        made.missing[name] = "onnxruntime has no kernels in bf16 for CPUs: use pt2 or aoti"
        return made.missing[name]
    try:
        halved = graph_of(opened.servable.module, example, torch.bfloat16)
    except TrainerError as error:
        made.missing[name] = str(error)
        return str(error)
    return _add(made, name, runtime, "bfloat16", halved, folder / f"bf16.{SUFFIXES[runtime]}")


def _int8(
    made: Made,
    opened: Opened,
    wanted: Wanted,
    example: Sequence[Tensor],
    graph: torch.export.ExportedProgram,
    folder: Path,
) -> str:
    name, source, path = "onnx int8", folder / "source.onnx", folder / f"int8.{SUFFIXES['onnx']}"
    try:
        onnx.write(graph, source)
        int8.write(source, path, _training_samples(opened))
    except NotHere as error:
        made.missing[name] = str(error)
        return str(error)
    finally:
        source.unlink(missing_ok=True)
    made.programs.append(Program(name, "onnx", path, "int8"))
    return ""


def _training_samples(opened: Opened) -> Iterator[dict[str, NDArray[Any]]]:
    """Training samples as a server would prepare them, so neither augmented nor those that are measured on."""
    servable = opened.servable
    taking = inputs.load(servable.preprocessing, servable.signature)
    train = opened.task.data.split("train")
    total = len(train) if train is not None else 0
    for index in np.unique(np.linspace(0, total - 1, int8.SAMPLES).astype(int)).tolist() if total else ():
        try:
            arrays = taking.prepare(taking.parse(servable.request("train", index), f"sample {index}"))
        except BadInput:
            continue  # one that training left out, too
        yield {
            field.name: np.ascontiguousarray(array[None])
            for field, array in zip(servable.signature.inputs, arrays, strict=True)
        }


def _dtype(opened: Opened) -> str:
    weights = next((p for p in opened.task.model.parameters() if p.is_floating_point()), torch.empty(0))
    return _DTYPES.get(weights.dtype, "float32")

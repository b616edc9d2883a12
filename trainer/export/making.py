"""The programs of a run that this machine can make, and why it can't make the others."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from trainer.errors import UserError
from trainer.export.opened import Opened
from trainer.export.programs import NotHere, Program, graph_of
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
    dtype = _dtype(opened)
    for name in MADE if wanted.format == "auto" else (wanted.format,):
        say(f"making {name}")
        path = folder / SUFFIXES[name]
        try:
            importlib.import_module(f"trainer.export.programs.{name}").write(graph, path)
        except NotHere as error:
            if wanted.format != "auto":
                raise UserError(f"--format {name}: {error}") from error
            made.missing[name] = str(error)
            continue
        made.programs.append(Program(name, name, path, dtype))
    return made


def _dtype(opened: Opened) -> str:
    weights = next((p for p in opened.task.model.parameters() if p.is_floating_point()), torch.empty(0))
    return _DTYPES.get(weights.dtype, "float32")

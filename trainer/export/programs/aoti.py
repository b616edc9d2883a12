"""Native code by AOTInductor."""

from __future__ import annotations

import io
import logging
import platform
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

from trainer.export.programs import NotHere, first_line


def require() -> None:
    """Raises NotHere without a C++ compiler."""
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        raise NotHere("no C++ compiler: apt-get install g++")


def write(graph: torch.export.ExportedProgram, path: Path) -> None:
    """Compile the graph for any CPU of this kind (x86: AVX2), not for this machine's alone. Raises NotHere."""
    require()
    options: dict[str, Any] = {}
    if platform.machine() == "x86_64":
        if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
            raise NotHere("this CPU has no AVX2")
        options = {"cpp.march": "x86-64-v3", "cpp.simdlen": 256}
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it misses a GPU
    memory = io.BytesIO()  # torch's own writer ends the whole process when the disk is full
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch._inductor.aoti_compile_and_package(graph, package_path=memory, inductor_configs=options)
    except Exception as error:  # of the compiler: about this model or this machine
        raise NotHere(f"AOTInductor: {first_line(error)}") from error
    path.write_bytes(memory.getbuffer())

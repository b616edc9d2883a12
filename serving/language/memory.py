"""For how many tokens there is memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from serving.errors import Mistake

if TYPE_CHECKING:
    from serving.language.program import Program

SHARE = 0.25
"""Of the memory that is free once the model is loaded: the machine has other processes."""
SHARE_OF_GPU = 0.8
LEAST = 64
_UNKNOWN = 4 << 30
_CGROUP = Path("/sys/fs/cgroup")


def room(program: Program, wanted: int | None, max_rows: int) -> int:
    """Tokens to keep keys and values of, as asked for or by the memory that is free.

    Raises Mistake for too few to answer anything.
    """
    import torch
    from transformers.cache_utils import DynamicCache

    with torch.inference_mode():
        program.read([0], DynamicCache())  # shows what a token takes
    if wanted is None:
        if program.device.type == "cuda":
            free = int(torch.cuda.mem_get_info(program.device)[0] * SHARE_OF_GPU)
        else:
            free = int(available() * SHARE)
        wanted = min(free // max(program.cell_bytes, 1), max_rows * program.context)
    if wanted < LEAST:
        raise Mistake(f"memory for {wanted} tokens is too little to answer anything: at least {LEAST} are wanted")
    return wanted


def available() -> int:
    """Bytes that may still be used: the machine's, or the container's where that is less."""
    found = [_UNKNOWN]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")] or found
        bound = (_CGROUP / "memory.max").read_text().strip()
        if bound.isdecimal():
            found.append(max(0, int(bound) - int((_CGROUP / "memory.current").read_text())))
    except (OSError, ValueError):
        pass  # no Linux, or no control group: what is known so far holds
    return min(found)

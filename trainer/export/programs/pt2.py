"""torch.export's own file."""

from __future__ import annotations

import io
from pathlib import Path

import torch


def write(graph: torch.export.ExportedProgram, path: Path) -> None:
    """Write the graph with its weights, without example inputs: they would be a pickle of the run's data."""
    # Through memory: torch's own writer ends the whole process when the disk is full.
    memory = io.BytesIO()
    examples, graph._example_inputs = graph.example_inputs, None  # the property takes no None
    try:
        torch.export.save(graph, memory)
    finally:
        graph._example_inputs = examples
    path.write_bytes(memory.getbuffer())

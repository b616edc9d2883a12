"""torch.export's own file."""

from __future__ import annotations

from pathlib import Path

import torch


def write(graph: torch.export.ExportedProgram, path: Path) -> None:
    """Write the graph with its weights, without example inputs: they would be a pickle of the run's data."""
    examples, graph._example_inputs = graph.example_inputs, None  # the property takes no None
    try:
        with path.open("wb") as file:
            torch.export.save(graph, file)
    finally:
        graph._example_inputs = examples

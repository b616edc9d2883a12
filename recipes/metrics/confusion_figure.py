"""A confusion matrix as a picture that can be read for ten classes and for a thousand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NUMBERED = 20
"""Up to so many classes each cell shows its count."""
NAMED = 60
"""Up to so many classes each row and column has its name."""
_LISTED = 50
_NAME_LENGTH = 24


def draw_confusion(confusion: NDArray[np.int64], class_names: Sequence[str], path: Path) -> None:
    """Write a PNG of counts [num_classes, num_classes], rows labels and columns predictions.

    Colours show the share of each label's samples. With many classes, where cells have no names, a list of the
    most frequent confusions stands beside the matrix.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_classes = len(class_names)
    short = [name if len(name) <= _NAME_LENGTH else f"{name[: _NAME_LENGTH - 1]}…" for name in class_names]
    names = [name.replace("$", r"\$") for name in short]  # a pair of dollars would be read as a formula
    side = float(np.clip(2.5 + 0.28 * num_classes, 5, 14))
    listing = num_classes > NAMED
    figure = Figure(figsize=(side + (6 if listing else 1), side), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    if listing:
        axes, side_axes = figure.subplots(1, 2, width_ratios=[side, 5])
        _list_confusions(side_axes, confusion, names)
    else:
        axes = figure.subplots()
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    # A square root makes rare confusions visible beside a strong diagonal.
    image = axes.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, ticks=np.sqrt([0, 0.01, 0.1, 0.25, 0.5, 1]))
    bar.ax.set_yticklabels(["0", "1 %", "10 %", "25 %", "50 %", "100 %"])
    bar.set_label("share of the label's samples")
    _label(axes, names)
    if num_classes <= NUMBERED:
        _number(axes, confusion, share)
    accuracy = np.trace(confusion) / max(confusion.sum(), 1)
    axes.set(xlabel="prediction", ylabel="label", title=f"{accuracy:.2%} of {confusion.sum():,} samples right")
    figure.savefig(path)


def _label(axes: Axes, names: Sequence[str]) -> None:
    step = 1 if len(names) <= NAMED else max(1, len(names) // 40)
    ticks = range(0, len(names), step)
    size = 9 if len(names) <= NUMBERED else 7
    axes.set_xticks(ticks, [names[tick] for tick in ticks], rotation=90, fontsize=size)
    axes.set_yticks(ticks, [names[tick] for tick in ticks], fontsize=size)


def _number(axes: Axes, confusion: NDArray[np.int64], share: NDArray[np.float64]) -> None:
    for (row, column), count in np.ndenumerate(confusion):
        if count:
            colour = "white" if share[row, column] > 0.4 else "black"
            axes.text(column, row, f"{count}", ha="center", va="center", fontsize=8, color=colour)


def _list_confusions(axes: Axes, confusion: NDArray[np.int64], names: Sequence[str]) -> None:
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    cells = np.argsort(wrong, axis=None, kind="stable")[::-1][:_LISTED]
    pairs = np.column_stack(np.unravel_index(cells, wrong.shape)).tolist()
    lines = [f"{wrong[row, column]:5d}  {names[row]} → {names[column]}" for row, column in pairs if wrong[row, column]]
    axes.axis("off")
    axes.set_title("most frequent confusions", loc="left", fontsize=10)
    axes.text(0, 1, "\n".join(lines) or "none", va="top", family="monospace", fontsize=9, transform=axes.transAxes)

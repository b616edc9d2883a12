"""A measurement as a picture: latencies above, rates below, over time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from serving.errors import ServingError
from serving.loadtest.measure import Measured
from serving.loadtest.report import ms
from serving.loadtest.summary import Summary, course

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"p50": "#7aa6c2", "p95": "#2f6f9f", "p99": "#d9480f"}
GREY, RED, GREEN = "#8a8f98", "#c92a2a", "#2b8a3e"


def draw(measured: Measured, summary: Summary, title: str, limits: dict[str, float], file: Path) -> None:
    """Write a PNG. `limits` are objectives of latency, `p99` -> ms. Raises ServingError where it can't be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    found = course(measured.records, max(measured.seconds, 1e-9))
    edges = np.append(found.starts, max(measured.seconds, 1e-3))
    middles = found.starts + found.width / 2
    for key, values in found.latency_ms.items():
        whole = f", {ms(summary.latency_ms[key])} ms in all" if summary.latency_ms else ""
        upper.plot(middles, values, color=COLOURS[key], marker=".", markersize=4, linewidth=1.4, label=key + whole)
    for key, limit in limits.items():
        upper.axhline(limit, color=COLOURS[key], linestyle=":", linewidth=1.2, label=f"{key} objective {limit:g} ms")
    _style(upper, "latency, ms (from when it was due)")
    shown = [values[~np.isnan(values)] for values in found.latency_ms.values()]
    if any(len(values) and values.max() > 20 * max(values.min(), 1e-6) for values in shown):
        upper.set_yscale("log")
        upper.yaxis.set_major_formatter(ScalarFormatter())
    lower.axhline(summary.target_rps, color=GREY, linestyle="--", linewidth=1.2, label="target")
    lower.stairs(found.due_rps, edges, baseline=None, color=GREY, linewidth=1, label="due")
    lower.stairs(found.answered_rps, edges, baseline=None, color=GREEN, linewidth=1.6, label="right answers")
    if found.failed_rps.any():
        lower.stairs(found.failed_rps, edges, baseline=None, color=RED, linewidth=1.4, label="errors")
    _style(lower, "requests/s")
    lower.set_ylim(bottom=0)
    lower.set_xlabel("seconds")
    lower.set_xlim(0, max(measured.seconds, 1e-3))
    note = " – INVALID: the generator was the bottleneck" if summary.invalid else ""
    figure.suptitle(title + note, fontsize=11, color=RED if summary.invalid else "black")
    try:
        figure.savefig(file, format="png", dpi=110)
    except OSError as error:
        raise ServingError(f"{file}: the plot can't be written ({error.strerror})") from error


def _style(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.grid(True, color="#e3e5e8", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, frameon=False)

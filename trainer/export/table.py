"""What was measured of each program, and which of them is taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from trainer.export.measure import Latency
from trainer.progress import aligned

RULE = "the smallest geometric mean of the medians at batch 1 and 32, among those within tolerance"
HEAD = ("format", "weights", "batch 1, ms", "batch 32, ms", "MB", "deviation", "tolerance", "labels", "")


@dataclass(frozen=True)
class Row:
    """One format."""

    name: str
    dtype: str = ""
    latency: dict[str, Latency] = field(default_factory=dict)
    """By batch size: "1", "32"."""
    bytes: int = 0
    deviation: float = 0.0
    """Largest from the run's answers, over all samples compared."""
    golden_deviation: float = 0.0
    """The same over the golden requests."""
    tolerance: float = 0.0
    samples: int = 0
    other_labels: int = 0
    """Samples with another best label."""
    wrong_labels: int = 0
    """Those whose best two scores are further apart than the tolerance explains."""
    metrics: dict[str, float] = field(default_factory=dict)
    missing: str = ""
    """Why there is no such program."""

    @property
    def is_good(self) -> bool:
        """Within its tolerance, and no label is wrong."""
        worst = max(self.deviation, self.golden_deviation)
        return not self.missing and worst <= self.tolerance and not self.wrong_labels

    @property
    def speed(self) -> float:
        """Milliseconds; what is compared."""
        return math.exp(sum(math.log(max(part.median, 1e-6)) for part in self.latency.values()) / len(self.latency))


def quickest(rows: Sequence[Row]) -> Row | None:
    """By `RULE`; None where no program is within its tolerance."""
    return min((row for row in rows if row.is_good), key=lambda row: row.speed, default=None)


def plain(rows: Sequence[Row], chosen: str) -> list[dict[str, Any]]:
    """For measurements.json."""
    return [
        {"format": row.name, "missing": row.missing}
        if row.missing
        else {
            "format": row.name,
            **{key: value for key, value in asdict(row).items() if key not in ("name", "missing")},
            "within_tolerance": row.is_good,
            "chosen": row.name == chosen,
        }
        for row in rows
    ]


def lines(rows: Sequence[Row], chosen: str) -> list[str]:
    """The table for a terminal, and for the card."""
    return aligned(HEAD, cells(rows, chosen))


def cells(rows: Sequence[Row], chosen: str) -> list[tuple[str, ...]]:
    """The table's text, row by row."""
    return [_cells(row, row.name == chosen) for row in rows]


def _cells(row: Row, is_chosen: bool) -> tuple[str, ...]:
    if row.missing:
        return (row.name, "", "", "", "", "", "", "", f"not made: {row.missing}")
    times = [f"{part.median:.3g} ({part.low:.3g}–{part.high:.3g})" for part in row.latency.values()]
    labels = f"{row.samples - row.other_labels}/{row.samples} equal"
    note = "chosen" if is_chosen else "" if row.is_good else "not within tolerance"
    worst = max(row.deviation, row.golden_deviation)
    size = f"{row.bytes / 1e6:.2f}"
    return (row.name, row.dtype, *times, size, f"{worst:.2g}", f"{row.tolerance:.2g}", labels, note)

"""What all benchmarks share: arguments, medians and ratios of interleaved rounds, the table, the JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Goal:
    """What a figure is held against: our median ratio to one peer."""

    peer: str
    ratio: float
    """At least this where higher is better, at most this where lower is better."""


@dataclass(frozen=True)
class Row:
    """One case: samples by contender, taken in the same rounds, so that sample i of each belongs together."""

    case: str
    unit: str
    ours: Sequence[float]
    peers: Mapping[str, Sequence[float]]
    better: Better
    goal: Goal | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Further figures for the JSON file."""

    def ratio(self, peer: str) -> float:
        """Median over the rounds of ours ÷ peer: noise that lasts longer than a round cancels."""
        return statistics.median(mine / other for mine, other in zip(self.ours, self.peers[peer], strict=True))

    @property
    def is_met(self) -> bool | None:
        if self.goal is None:
            return None
        ratio = self.ratio(self.goal.peer)
        return ratio >= self.goal.ratio if self.better == "higher" else ratio <= self.goal.ratio

    def as_json(self) -> dict[str, Any]:
        goal = None if self.goal is None else {**vars(self.goal), "met": self.is_met}
        return {
            "case": self.case,
            "unit": self.unit,
            "ours": statistics.median(self.ours),
            "peers": {name: statistics.median(samples) for name, samples in self.peers.items()},
            "ratios": {name: self.ratio(name) for name in self.peers},
            "spread": {"ours": spread(self.ours), **{name: spread(samples) for name, samples in self.peers.items()}},
            "rounds": len(self.ours),
            "better": self.better,
            "goal": goal,
            **self.notes,
        }


def parse_arguments(description: str | None) -> argparse.Namespace:
    """`--quick` and `--json FILE`, which all benchmarks take."""
    return argument_parser(description).parse_args()


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """The parser of these, for a benchmark that takes more."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="end within a minute; the figures are rough")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures to FILE, too")
    return parser


def spread(samples: Sequence[float]) -> float:
    """Distance of the quartiles ÷ median; for two samples, of the extremes; 0 for one."""
    if len(samples) < 2:
        return 0.0
    low, _, high = (
        statistics.quantiles(samples, n=4, method="inclusive")
        if len(samples) > 2
        else (min(samples), 0.0, max(samples))
    )
    return abs(high - low) / statistics.median(samples)


def finish(
    title: str,
    rows: Sequence[Row],
    json_file: Path | None,
    packages: Sequence[str],
    elsewhere: Mapping[str, str] | None = None,
) -> None:
    """Print the table and write the file; `elsewhere` are versions in a peer's own environment."""
    show(title, rows)
    if json_file is not None:
        write([row.as_json() for row in rows], json_file, {**versions(packages), **(elsewhere or {})})


def write(rows: Sequence[Mapping[str, Any]], json_file: Path, found: Mapping[str, str]) -> None:
    """The JSON file: the rows, what they were taken on, and the versions that took part."""
    content = {"rows": rows, "machine": machine(), "versions": found}
    json_file.write_text(json.dumps(content, indent=2) + "\n")


def show(title: str, rows: Sequence[Row]) -> None:
    """One line per contender of each case; the last column is our median ratio to it, and the goal."""
    table = Table(title=title, title_justify="left")
    for name in ("case", "contender"):
        table.add_column(name)
    for name in ("median", "spread", "ours ÷ it", "goal"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(f"[bold]{row.case}[/bold]", "[bold]ours[/bold]", *_figures(row.ours, row.unit), "", "")
        for number, (name, samples) in enumerate(row.peers.items()):
            goal = ""
            if row.goal is not None and row.goal.peer == name:
                sign = "≥" if row.better == "higher" else "≤"
                goal = f"{sign} {row.goal.ratio:.2f} {'[green]met' if row.is_met else '[red]missed'}"
            better = f"{row.better} is better" if number == 0 else ""
            table.add_row(better, name, *_figures(samples, row.unit), f"{row.ratio(name):.3f}", goal)
        table.add_section()
    # Pipes and files get the whole width: a cut figure is none.
    console = Console()
    Console(width=console.width if console.is_terminal else 120).print(table)


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "load_average": round(os.getloadavg()[0], 2),
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Python's version and those of the distributions that took part."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _figures(samples: Sequence[float], unit: str) -> tuple[str, str]:
    return f"{statistics.median(samples):,.4g} {unit}", f"{spread(samples):.1%}"

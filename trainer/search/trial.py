"""Trials as plain data: what was proposed, what was reported, what became of it. No torch, no Ray, no Optuna."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from trainer.verdict import Verdict

__all__ = ["ENDED", "FAILED", "FINISHED", "PAUSED", "PRUNED", "RUNNING", "WAITING", "Report", "Trial", "Verdict"]

WAITING, RUNNING, PAUSED = "waiting", "running", "paused"
FINISHED, PRUNED, FAILED = "finished", "pruned", "failed"
ENDED = (FINISHED, PRUNED, FAILED)
"""States that a trial does not leave."""


@dataclass(frozen=True)
class Report:
    """One evaluation of a trial (with cross-validation: one fold)."""

    iteration: int
    """1-based count of the run's evaluations, or of folds."""
    step: int
    epoch: float
    metrics: dict[str, float]
    """By full name. With cross-validation the fold's own; `Trial.reports` then has the means over the folds so far."""
    seconds: float
    """Of training since the trial began."""

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Report:
        """From an event of the journal."""
        return cls(entry["iteration"], entry["step"], entry["epoch"], entry["metrics"], entry["seconds"])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Trial:
    """All that is known of a trial. Changed by `Search` only."""

    number: int
    """0-based; negative for one taken over from another search."""
    params: dict[str, Any]
    """Dotted key -> value, of the parameters that are active, in the space's order."""
    state: str = WAITING
    reports: list[Report] = field(default_factory=list)
    """One per iteration, in order; after a `REPLACE` the iterations go on from the other trial's."""
    values: tuple[float, ...] | None = None
    """Objective values: as told when finished; of a pruned trial, those of its last report."""
    attempts: int = 0
    """How often it was started or went on."""
    failures: int = 0
    """How often its worker was lost."""
    error: str | None = None
    traceback: str | None = None
    source: tuple[int, int] | None = None
    """(trial number, step) of the checkpoint that the current segment begins from."""
    segment: int = 0
    """How often its parameters were replaced."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Earlier `params`, each with the `iteration` at which they ended."""
    seconds: dict[str, float] = field(default_factory=dict)
    """`train`, `evaluate`, `setup`, `slot`: added up over the attempts."""
    folds: list[dict[str, float]] = field(default_factory=list)
    """Cross-validation: all metrics of each finished fold."""
    runs: list[str] = field(default_factory=list)
    """Run directories, relative to the search's."""
    origin: str | None = None
    """Where a trial with a negative number was taken from."""

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED

    def add_seconds(self, seconds: Mapping[str, float]) -> None:
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value

    def add_run(self, run: str | None) -> None:
        if run is not None and run not in self.runs:
            self.runs.append(run)

"""Which checkpoints of a search stay: those of the best trials, and whatever a resume or a population still needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trainer import checkpoint
from trainer.search.trial import Trial

if TYPE_CHECKING:
    from trainer.search.search import Search


class Janitor:
    """Looks after the checkpoints below a search's `trials/`."""

    def __init__(self, folder: Path, search: Search, keep: int) -> None:
        """`keep` best trials keep theirs."""
        self._folder, self._search, self._keep = folder, search, keep
        self._holding = {trial.number for trial in search.trials.values() if trial.number >= 0}
        """Trials that may have checkpoints: only those are looked at."""

    def clean(self, changed: Trial) -> list[Path]:
        """Remove what is not needed any more, now that `changed` has saved or ended; returns what was removed."""
        self._holding.add(changed.number)
        needed = self._search.needed_checkpoints()
        best = {trial.number for trial in self._search.best()[: self._keep]}
        removed: list[Path] = []
        for number in sorted(self._holding):
            trial = self._search.trials[number]
            steps = {step for owner, step in needed if owner == number and step is not None}
            if trial.has_ended and number not in best:
                removed += self._discard(trial, steps)
                if not steps:
                    self._holding.discard(number)
            elif trial is changed:
                removed += self._discard(trial, steps, keeps_newest=True)
        return removed

    def _discard(self, trial: Trial, needed: set[int], keeps_newest: bool = False) -> list[Path]:
        removed = []
        for run in trial.runs:
            present = checkpoint.present(self._folder / run / "checkpoints")
            if keeps_newest and present and run == trial.runs[-1]:
                present = present[:-1]  # what this trial itself goes on from
            for path in present:
                if checkpoint.step_of(path) not in needed:
                    checkpoint.discard(path)
                    removed.append(path)
        return removed

"""Sends a search on to MLflow, in the one mirror process that a search has: itself, and each of its trials."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from trainer.contact import Contact
from trainer.run import DAMAGED, KILLED, RUNNING
from trainer.search.mirrored import FollowedSearch, MirroredSearch, MirroredTrial, trial_folders
from trainer.sending import Mirror
from trainer.tracking import DONE, read_state

FAILURES = 3
"""So many trials that can't be sent in one attempt: then the others will not be, either."""


class TrialMirror(Mirror):
    """What is still to be sent of one trial."""

    def __init__(self, trial: MirroredTrial, order: dict[str, Any], contact: Contact) -> None:
        self.trial = trial
        self._own_order = dict(order)
        super().__init__(trial, self._own_order, contact)

    def look(self, folders: list[tuple[Path, str]], is_over: bool) -> None:
        """Take in the runs that are there by now; whether the trial has ended."""
        self._own_order["is_over"] = is_over
        self.trial.runs = [
            (path.parent, prefix) for folder, prefix in folders for path in sorted(folder.glob("*/config.yaml"))
        ]


class SearchMirror(Mirror):
    """What is still to be sent of a search: itself, then each trial; one that fails doesn't hinder the others."""

    def __init__(self, search: MirroredSearch, order: dict[str, Any]) -> None:
        self._search = search
        self._trials: dict[int, TrialMirror] = {}
        self._sent: dict[int, str] = {}
        """Trials of which all is sent -> the status they ended with."""
        self._looking = threading.Lock()
        search.refresh()
        super().__init__(search, order)

    def send(self, deadline: float, final: str | None = None) -> bool:
        self._search.refresh()
        return super().send(deadline, final)

    def end_by(self, deadline: float) -> None:
        super().end_by(deadline)
        for trial in list(self._trials.values()):
            trial.end_by(deadline)

    def count_pending(self) -> int:
        """Of the search and all its trials."""
        self._look()
        return super().count_pending() + sum(trial.count_pending() for trial in list(self._trials.values()))

    def _steps(self, final: str | None) -> list[Callable[[], None]]:
        connect, describe, points, *others = super()._steps(final)
        return [connect, describe, points, lambda: self._send_trials(final), *others]

    def _send_trials(self, final: str | None) -> None:
        ended = self._look()
        failed: list[str] = []
        for number, trial in sorted(self._trials.items()):
            status = ended.get(number) or final
            is_sent = trial.send(self._deadline, status)
            if is_sent and status is not None:
                trial.close(True, "")
                with self._looking:
                    self._sent[number] = status
                    del self._trials[number]
            elif trial.failures:
                failed.append(f"trial {number}: {trial.state['last_error']}")
            if self._is_late() or self.contact.is_silent or len(failed) == FAILURES:
                break
        if failed:
            raise ConnectionError(failed[0])

    def _look(self) -> dict[int, str | None]:
        """Trials with the status each has ended with; those that have something to send get their mirror."""
        with self._looking:
            folders = trial_folders(self._search.path)
            ended: dict[int, str | None] = dict.fromkeys(folders)
            ended |= {number: str(entry["state"]) for number, entry in self._search.entries.items() if number >= 0}
            for number, status in ended.items():
                if not self._is_sent(number, status):
                    is_over = status is not None or bool(self._order.get("is_over"))
                    self._mirror_of(number).look(folders.get(number, []), is_over)
            return ended

    def _is_sent(self, number: int, status: str | None) -> bool:
        if status is None:
            # Over with the whole search: nothing comes any more, unless the search goes on
            return number in self._sent and number not in self._trials
        if number not in self._sent and number not in self._trials:
            state = read_state(self._trial(number).path)
            if state.get("state") == DONE and state.get("uri") == self.state["uri"]:
                self._sent[number] = str(state.get("status"))
        return self._sent.get(number) == status

    def _mirror_of(self, number: int) -> TrialMirror:
        if number not in self._trials:
            self._sent.pop(number, None)
            self._trials[number] = TrialMirror(self._trial(number), self._order, self.contact)
            self._trials[number].end_by(self._deadline)
        return self._trials[number]

    def _trial(self, number: int) -> MirroredTrial:
        return MirroredTrial(self._search, number, lambda: str(self.state["mlflow_run_id"]))


class SearchSource:
    """A search directory, for the mirror's process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._folder = FollowedSearch(path)

    def mirror(self, order: dict[str, Any]) -> Mirror:
        return SearchMirror(MirroredSearch(self._folder), order)

    def others(self, order: dict[str, Any], contact: Contact) -> Generator[None]:
        """None: the trials are work enough."""
        yield from ()

    def final_status(self, order: dict[str, Any]) -> str:
        status = self._folder.status
        return KILLED if status in (RUNNING, DAMAGED) else status

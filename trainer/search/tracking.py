"""MLflow from the search's process: one mirror for the whole search, started, and told how the search ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.run import DAMAGED, RUNNING
from trainer.search.mirrored import SEARCH_FILE, STATE_FOLDER, FollowedSearch
from trainer.tracking import DONE, SEARCH, Tracker, read_state

if TYPE_CHECKING:
    from trainer.config import RunConfig


class SearchTracker(Tracker):
    """The mirror of one search, seen from the search's process; as `Tracker`, whose `finish` waits while sending makes
    progress."""

    work = "the search"

    def __init__(
        self, folder: Path, config: RunConfig, say: Callable[[str], None] | None = None, is_over: bool = False
    ) -> None:
        """`is_over`: nobody is at work on the search any more, and only the rest is sent."""
        super().__init__(FollowedSearch(folder), config.tracking, say)
        self._is_over = is_over

    def _order(self) -> dict[str, Any]:
        return {**super()._order(), "kind": SEARCH, "is_over": self._is_over}


def find_searches(runs_dir: str | Path) -> list[FollowedSearch]:
    """All searches below `runs_dir`, newest first."""
    folders = [file.parent for file in Path(runs_dir).glob(f"*/*/{SEARCH_FILE}")]
    return [FollowedSearch(folder) for folder in sorted(folders, key=lambda folder: folder.name, reverse=True)]


def is_unsent(search: FollowedSearch) -> bool:
    """Whether the search has ended, as far as this host can tell, and MLflow doesn't have all of it."""
    if search.status in (RUNNING, DAMAGED):
        return False
    state = read_state(search.path)
    if not state:
        return bool((search.base().get("tracking") or {}).get("enabled"))
    states = [read_state(folder) for folder in (search.path / STATE_FOLDER).glob("t*")]
    return any(found.get("state") != DONE for found in (state, *states)) or state.get("status") != search.status

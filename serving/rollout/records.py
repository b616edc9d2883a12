"""What is kept of single requests: evidence not yet weighed, predictions that wait for their labels, assignments."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from serving.rollout.evidence import Observation
from serving.rollout.split import Route
from serving.rollout.state import now

WAITING = 200_000
"""Predictions that wait for a label; the oldest are forgotten beyond."""
SECRET_KEYS = ("api-key", "cookie")
"""Kinds of key of which only a hash is written down."""


class Records:
    """Requests of one rollout since they were last taken."""

    def __init__(self, sticky: str, logs_assignments: bool) -> None:
        self._is_secret = sticky.partition(":")[0] in SECRET_KEYS
        self._logs = logs_assignments
        self._seen: list[Observation] = []
        self._assignments: list[dict[str, Any]] = []
        self._waiting: OrderedDict[str, tuple[bool, float | None, str]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, one: Observation, route: Route, request_id: str) -> None:
        """Take a request that has ended."""
        self._seen.append(one)
        if one.label is not None:
            self._wait(request_id, one.is_new, one.share, one.label)
        if self._logs:
            self._assignments.append(
                {
                    "time": now(),
                    "request_id": request_id,
                    "arm": "new" if one.is_new else "old",
                    "key": self._shown(route.key),
                    "share": one.share,
                    "status": one.status,
                    "label": one.label,
                }
            )

    def observations(self) -> list[Observation]:
        """Those not yet taken, in the order of their ends."""
        seen, self._seen = self._seen, []
        return seen

    def assignments(self) -> list[dict[str, Any]]:
        """Lines for the log that were not yet taken."""
        lines, self._assignments = self._assignments, []
        return lines

    def recall(self, lines: Sequence[dict[str, Any]]) -> None:
        """Take up the predictions of an earlier process from its assignment log."""
        for line in lines:
            if line.get("label") is not None and "request_id" in line:
                self._wait(line["request_id"], line.get("arm") == "new", line.get("share"), str(line["label"]))

    def label(self, request_id: str, label: str) -> tuple[bool, float | None, bool] | None:
        """(of the new version, chance of it, wrong) of a prediction whose label came; None for an unknown request."""
        found = self._waiting.pop(request_id, None)
        return None if found is None else (found[0], found[1], found[2] != label)

    def _wait(self, request_id: str, is_new: bool, share: float | None, label: str) -> None:
        self._waiting[request_id] = (is_new, share, label)
        if len(self._waiting) > WAITING:
            self._waiting.popitem(last=False)

    def _shown(self, key: str | None) -> str | None:
        if key is None or not self._is_secret:
            return key
        return hashlib.blake2b(key.encode(), digest_size=8).hexdigest()

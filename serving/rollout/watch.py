"""The time after a promotion, in which the version before is kept running to switch back to."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from serving.rollout import plan as plans
from serving.rollout.evidence import Evidence, Observation
from serving.rollout.judge import Finding, judge
from serving.rollout.plan import Plan
from serving.rollout.versions import Version


class Watch:
    """Follows the promoted version by the hard limits alone: nobody else has traffic to compare it with."""

    def __init__(self, before: Version, plan: Plan, seconds: float) -> None:
        self.before, self._plan = before, plan
        self._until = time.time() + seconds  # of the wall clock: it goes on while no front runs
        self._evidence = Evidence(plan)
        self._seen: list[Observation] = []

    def __len__(self) -> int:
        return len(self._seen)

    def left(self) -> float:
        """Seconds for which the version before is still kept."""
        return self._until - time.time()

    def add(self, one: Observation) -> None:
        """Take a request of the promoted version."""
        self._seen.append(replace(one, is_new=True, share=None))

    def weigh(self) -> Finding | None:
        """The hard limit that is broken, if one is."""
        seen, self._seen = self._seen, []
        self._evidence.observe(seen, time.time())
        found = judge(self._plan, self._evidence, time.time())[0]
        return found if found.level == "worse" else None

    def state(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            "source": self.before.source,
            "plan": plans.to_state(self._plan),
            "until": self._until,
            "evidence": self._evidence.state(),
        }

    @classmethod
    def restore(cls, before: Version, state: dict[str, Any]) -> Watch:
        """The inverse of `state`."""
        made = cls(before, plans.build_plan(state["plan"]), 0.0)
        made._until = state["until"]
        made._evidence = Evidence.restore(made._plan, state["evidence"])
        return made

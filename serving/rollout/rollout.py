"""One rollout: its plan, how far it has come, and what was seen."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from typing import Any

from serving.rollout import plan as plans
from serving.rollout.decide import Decision, Standing, decide
from serving.rollout.evidence import Evidence
from serving.rollout.judge import Finding, judge
from serving.rollout.plan import Plan, Step
from serving.rollout.records import Records
from serving.rollout.split import RECORD, Splitter
from serving.rollout.state import ASSIGNMENTS, KEYS, StateDirectory, now
from serving.rollout.versions import Version


class Rollout:
    """What a rollout's process must know to go on with it."""

    def __init__(self, source: str, plan: Plan, name: str | None = None) -> None:
        self.source, self.plan = source, plan
        self.name = name or secrets.token_hex(4)
        """Also the salt of sticky keys, so that each rollout begins with other clients."""
        self.started = now()
        self.step = -1
        """-1 until the new version is ready and has passed its checks."""
        self.elapsed = 0.0
        self.requests = 0
        self.crashes_before = 0
        """Ends of the new version's process under earlier fronts."""
        self.evidence = Evidence(plan)
        self.shadowed: Counter[str] = Counter()
        self.held = ""
        """Kind of the hold that was told last."""
        self.records = Records(plan.split.sticky, plan.logs_assignments)

    @property
    def current(self) -> Step | None:
        """The step; None before the first."""
        return self.plan.steps[self.step] if self.step >= 0 else None

    def enter(self, step: int) -> None:
        """Begin a step."""
        self.step, self.elapsed, self.requests, self.held = step, 0.0, 0, ""

    def weigh(self) -> int:
        """Take the requests since the last time into the evidence; returns their number."""
        seen = self.records.observations()
        self.requests += sum(one.is_new for one in seen)
        if self.plan.mirrors:  # of a pair a coin has chosen one: both count as a request
            self.requests = sum(count for result, count in self.shadowed.items() if result != "left_out")
        self.evidence.observe(seen, time.time())
        return len(seen)

    def findings(self) -> list[Finding]:
        """What the evidence says."""
        return judge(self.plan, self.evidence, time.time())

    def decide(self, version: Version, unready_seconds: float) -> Decision:
        """What is to be done now."""
        standing = Standing(
            self.step,
            self.elapsed,
            self.requests,
            self.crashes_before + version.crashes,
            unready_seconds,
            version.reason,
        )
        return decide(self.plan, standing, self.findings())

    def learn(self, labels: list[tuple[str, str]]) -> dict[str, int]:
        """Take labels by request id; those of requests that nobody knows (any more) are counted."""
        found = [self.records.label(request_id, label) for request_id, label in labels]
        known = [entry for entry in found if entry is not None]
        drawn = [(is_new, share, wrong) for is_new, share, wrong in known if share is not None and 0.0 < share < 1.0]
        if drawn:
            is_new, share, wrong = zip(*drawn, strict=True)
            self.evidence.learn(wrong, is_new, share)
        return {"taken": len(known), "unknown": len(found) - len(known)}

    def recall(self, directory: StateDirectory, splitter: Splitter) -> None:
        """Take up keys and assignments of an earlier process."""
        splitter.remember(directory.records_of(KEYS, RECORD.size))
        if self.plan.logs_assignments:
            self.records.recall(directory.lines(ASSIGNMENTS, last=20_000))

    def state(self, crashes: int) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            "source": self.source,
            "name": self.name,
            "plan": plans.to_state(self.plan),
            "started": self.started,
            "step": self.step,
            "elapsed": round(self.elapsed, 3),
            "requests": self.requests,
            "crashes": self.crashes_before + crashes,
            "held": self.held,
            "shadowed": dict(self.shadowed),
            "evidence": self.evidence.state(),
        }

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Rollout:
        """The inverse of `state`."""
        made = cls(state["source"], plans.build_plan(state["plan"]), state["name"])
        made.started, made.step, made.elapsed = state["started"], state["step"], state["elapsed"]
        made.requests, made.crashes_before, made.held = state["requests"], state["crashes"], state["held"]
        made.shadowed.update(state["shadowed"])
        made.evidence = Evidence.restore(made.plan, state["evidence"])
        return made

"""From findings to an action. Pure functions: what they are given is all they know."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from serving.rollout.judge import Finding
from serving.rollout.plan import Plan

Action = Literal["rollback", "advance", "promote", "hold"]


@dataclass(frozen=True)
class Standing:
    """Where a rollout is."""

    step: int
    elapsed: float
    """Seconds of the step."""
    requests: int
    """Of the new version in the step."""
    crashes: int = 0
    unready_seconds: float = 0.0
    reason: str = ""
    """Why it is not ready."""


@dataclass(frozen=True)
class Decision:
    """What is to be done, and why."""

    action: Action
    kind: str
    """Short name of the reason: a hold is told anew only when this changes."""
    reason: str
    figures: dict[str, Any] = field(default_factory=dict)


def decide(plan: Plan, standing: Standing, findings: list[Finding]) -> Decision:
    """The action for a rollout at this moment."""
    figures = {finding.test: finding.figures for finding in findings if finding.figures}
    return _harm(plan, standing, findings, figures) or _progress(plan, standing, findings, figures)


def _harm(plan: Plan, standing: Standing, findings: list[Finding], figures: dict[str, Any]) -> Decision | None:
    limits = plan.limits
    if standing.crashes >= limits.crashes:
        text = f"its process ended {standing.crashes} times by itself ({standing.reason})"
        return Decision("rollback", "crashes", text, figures)
    if standing.unready_seconds > limits.unready_seconds:
        text = f"not ready for {standing.unready_seconds:.0f} s: {standing.reason}"
        return Decision("rollback", "unready", text, figures)
    if findings and findings[0].level == "worse":
        return Decision("rollback", findings[0].test, findings[0].text, figures)
    return None


def _progress(plan: Plan, standing: Standing, findings: list[Finding], figures: dict[str, Any]) -> Decision:
    step = plan.steps[standing.step]
    if standing.elapsed < step.seconds or standing.requests < step.requests:
        text = f"step {standing.step + 1} of {len(plan.steps)}: {step.percent:g} % of the traffic for at least "
        return Decision("hold", "running", f"{text}{step.seconds:g} s and {step.requests} requests", figures)
    if findings and findings[0].level == "doubtful":
        return Decision("hold", f"doubt:{findings[0].test}", f"undecided, waiting: {findings[0].text}", figures)
    unsure = [finding for finding in findings if finding.no_worse is False]
    if plan.non_inferior and unsure:
        text = f"not yet shown to be within the margin: {unsure[0].text}"
        return Decision("hold", f"unsure:{unsure[0].test}", text, figures)
    shown = "nothing is shown against it" if not plan.non_inferior else "shown to be within the margins"
    text = f"{standing.requests} requests and {standing.elapsed:.0f} s of step {standing.step + 1}: {shown}"
    if standing.step + 1 < len(plan.steps):
        return Decision("advance", "step", text, figures)
    if plan.promotes:
        return Decision("promote", "end", text, figures)
    return Decision("hold", "end", f"{text}; it waits for word: trainer deploy promote, or rollback", figures)

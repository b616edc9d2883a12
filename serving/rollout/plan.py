"""What is to happen to a new version: the plan of a rollout, with defaults that work without a file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from serving.rollout.strict import build, read_yaml

Strategy = Literal["canary", "blue-green", "shadow", "ab"]


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise ValueError(text)


@dataclass(frozen=True)
class Step:
    """A share of the traffic, held for a time and a number of requests."""

    percent: float
    """Of the traffic that the new version takes."""
    seconds: float = 300.0
    """Time at least, counted while the front runs and the new version is ready."""
    requests: int = 500
    """Requests at least that the new version has answered (under `shadow`: copies)."""

    def __post_init__(self) -> None:
        _require(0.0 <= self.percent <= 100.0, f"percent: got {self.percent:g}, wanted 0 to 100")
        _require(self.seconds >= 0.0, f"seconds: got {self.seconds:g}, wanted 0 or more")
        _require(self.requests >= 0, f"requests: got {self.requests}, wanted 0 or more")


@dataclass(frozen=True)
class Split:
    """Who is sent where."""

    sticky: str = ""
    """Empty: each request is drawn anew. `client` (address), `api-key`, `header:NAME` or `cookie:NAME`: one key, one
    version; who was on the new one stays there when its share grows. Requests without the key are drawn anew."""
    header: str = ""
    """`Name: value`; requests with it go to the new version. `X-Model-Version: new`, `old` and exact versions always
    work."""

    def __post_init__(self) -> None:
        kind, _, name = self.sticky.partition(":")
        known = self.sticky in ("", "client", "api-key") or (kind in ("header", "cookie") and name.strip())
        _require(bool(known), f"sticky: got {self.sticky!r}, wanted client, api-key, header:NAME or cookie:NAME")
        _require(
            not self.header or all(part.strip() for part in self.header.partition(":")),
            f"header: got {self.header!r}, wanted `Name: value`",
        )


@dataclass(frozen=True)
class Limits:
    """What sends the new version back at once, whatever the old one does, unless the old one is as bad."""

    errors: float | None = 0.01
    """Share of requests that fail: no answer, or a status of 500 and above."""
    p95_ms: float | None = 500.0
    """A share of more than 5 % of the requests takes longer."""
    crashes: int = 2
    """Ends of its process that nobody asked for."""
    unready_seconds: float = 60.0
    """How long it may not be ready at a stretch."""

    def __post_init__(self) -> None:
        _require(self.errors is None or 0.0 < self.errors < 1.0, "errors: wanted a share between 0 and 1")
        _require(self.p95_ms is None or self.p95_ms > 0.0, "p95_ms: wanted more than 0")
        _require(self.crashes >= 1, "crashes: wanted at least 1")


@dataclass(frozen=True)
class Margins:
    """By how much the new version may be worse than the old one."""

    errors: float = 0.001
    """Share of requests that fail."""
    refusals: float = 0.01
    """Share of requests that it refuses (status 400 to 499)."""
    latency: float = 0.10
    """Of the old version's latency, by rank over all of the distribution."""
    latency_ms: float = 0.5
    """And by as many milliseconds."""
    predictions: float = 0.10
    """How much more or less often it may give any label."""
    labels: float = 0.02
    """Share of wrong labels, once the right ones are posted."""

    def __post_init__(self) -> None:
        for name in ("errors", "refusals", "predictions", "labels"):
            value = getattr(self, name)
            _require(0.0 <= value < 1.0, f"{name}: got {value:g}, wanted a share from 0 to below 1")
        _require(self.latency >= 0.0 and self.latency_ms >= 0.0, "latency: wanted 0 or more")


@dataclass(frozen=True)
class Plan:
    """All of a rollout."""

    strategy: Strategy = "canary"
    steps: tuple[Step, ...] = ()
    """Of the strategy where there are none, see `DEFAULT_STEPS`."""
    split: Split = field(default_factory=Split)
    limits: Limits = field(default_factory=Limits)
    margins: Margins = field(default_factory=Margins)
    false_rollbacks: float = 0.01
    """Chance at most that a version as good as the old one is sent back, all tests and looks together."""
    non_inferior: bool = False
    """Go on only once it is shown that errors and latency are within their margins, not just not shown to be worse."""
    golden: bool = True
    """Replay the bundle's golden requests through the new version before each step."""
    golden_file: str = ""
    """JSON Lines of `{"request": INSTANCE, "prediction": ...}`, for versions that are URLs."""
    at_end: Literal["promote", "hold", "auto"] = "auto"
    """After the last step: promote, or hold and wait for word. `auto` promotes, and holds under `shadow` and `ab`."""
    keep_warm_seconds: float = 600.0
    """How long the old version goes on running after the promotion, to switch back to at once."""
    retry: Literal["failures", "unsent", "never"] = "failures"
    """Which failed requests of the new version the old one answers: all (predictions can be made twice), those that
    were never sent, or none."""
    assignment_log: bool = False
    """Write who was sent where to `assignments.jsonl`; always on under `ab`."""
    shadow_in_flight: int = 16
    """Copies under way at most; more are left out."""

    def __post_init__(self) -> None:
        _require(0.0 < self.false_rollbacks <= 0.2, "false_rollbacks: wanted more than 0, 0.2 at most")
        _require(self.keep_warm_seconds >= 0.0, "keep_warm_seconds: wanted 0 or more")
        _require(self.shadow_in_flight >= 1, "shadow_in_flight: wanted at least 1")
        if not self.steps:
            object.__setattr__(self, "steps", DEFAULT_STEPS[self.strategy])
        shares = [step.percent for step in self.steps]
        _require(shares == sorted(shares), "steps: the percentages must not fall from one step to the next")
        _require(self.strategy != "shadow" or not any(shares), "steps: a shadow answers nobody, so percent is 0")
        _require(self.strategy == "shadow" or all(shares), "steps: percent must be above 0")

    @property
    def mirrors(self) -> bool:
        """Whether requests are copied to the new version."""
        return self.strategy == "shadow"

    @property
    def logs_assignments(self) -> bool:
        """Whether `assignments.jsonl` is written."""
        return self.assignment_log or self.strategy == "ab"

    @property
    def promotes(self) -> bool:
        """Whether the last step's end is the promotion."""
        return self.at_end == "promote" or (self.at_end == "auto" and self.strategy in ("canary", "blue-green"))


DEFAULT_STEPS: dict[str, tuple[Step, ...]] = {
    "canary": (Step(10.0), Step(50.0), Step(100.0)),
    "blue-green": (Step(100.0, seconds=600.0),),
    "shadow": (Step(0.0, seconds=600.0, requests=1000),),
    "ab": (Step(50.0, seconds=86_400.0, requests=1000),),
}


def load(path: Path | None, strategy: str | None = None) -> Plan:
    """The plan of a YAML file, or the default one; `strategy` overrides the file's. Raises Mistake."""
    data: Any = {} if path is None else read_yaml(path) or {}
    if strategy is not None and isinstance(data, dict):
        data = {**data, "strategy": strategy}
    return build(Plan, data, str(path) if path is not None else "plan")


def build_plan(data: Any) -> Plan:
    """A plan from plain data, as `to_state` gives it. Raises Mistake."""
    return build(Plan, data, "plan")


def to_state(plan: Plan) -> dict[str, Any]:
    """All of the plan as JSON."""
    data = asdict(plan)
    data["steps"] = list(data["steps"])
    return data

"""Conducts rollouts: weighs what was seen, decides, acts, and writes down where it stands."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from serving.errors import Mistake, ServingError
from serving.rollout import golden
from serving.rollout.decide import Decision
from serving.rollout.evidence import Observation
from serving.rollout.hook import Hook
from serving.rollout.metrics import Metrics
from serving.rollout.plan import Limits, Plan, Step
from serving.rollout.rollout import Rollout
from serving.rollout.routing import Routing
from serving.rollout.split import Route
from serving.rollout.state import ASSIGNMENTS, KEYS, LOG, StateDirectory, now
from serving.rollout.versions import Version
from serving.rollout.watch import Watch

if TYPE_CHECKING:
    import aiohttp

TICK_SECONDS = 0.25
SAVE_SECONDS = 1.0
"""Between two states on disk while nothing is decided: what SIGKILL may cost of the evidence."""
AT_ONCE = 32
"""Requests that are weighed without waiting for the next tick."""
START_SECONDS = 600.0
"""How long a version may take to get ready: models are large."""


class Controller:
    """The one writer of the routing and of the state directory."""

    def __init__(
        self,
        directory: StateDirectory,
        settings: dict[str, Any],
        routing: Routing,
        make: Callable[[str], Version],
        session: aiohttp.ClientSession,
        metrics: Metrics,
        say: Callable[[str], None],
    ) -> None:
        self._directory, self._settings, self._make = directory, settings, make
        self._routing, self._session, self._metrics, self._say = routing, session, metrics, say
        self.rollout: Rollout | None = None
        self.watch: Watch | None = None
        """Of the promoted version, while the one before it is kept warm."""
        self._previous_source: str | None = None
        self._hook = Hook(settings["hook"], self._hook_told)
        self._wake = asyncio.Event()
        self._saved = 0.0
        self._acting = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()

    # ---- what the proxy tells

    def seen(self, one: Observation, route: Route, request_id: str, version: Version) -> None:
        """Take what came of a request."""
        if self.rollout is not None and not self._routing.mirrors:
            if self.rollout.step >= 0 and version in (self._routing.old, self._routing.new):
                self.rollout.records.add(one, route, request_id)
                self._wake_for(len(self.rollout.records))
        elif self.watch is not None and version is self._routing.old:
            self.watch.add(one)
            self._wake_for(len(self.watch))

    def seen_pair(self, one: Observation) -> None:
        """Take a shadow's pair."""
        if self.rollout is not None:
            self.rollout.records.add(one, Route(one.is_new, one.share), "")
            self._wake_for(len(self.rollout.records))

    def count_pair(self, result: str) -> None:
        """Count a shadow's pair by what came of it."""
        if self.rollout is not None:
            self.rollout.shadowed[result] += 1

    def _wake_for(self, waiting: int) -> None:
        if waiting >= AT_ONCE:
            self._wake.set()

    # ---- what people ask for

    async def start(self, source: str, plan: Plan) -> str:
        """Begin a rollout; returns its name. Raises Mistake."""
        async with self._acting:
            if self.rollout is not None:
                raise Mistake(f"a rollout of {self.rollout.source} is under way; promote it or roll it back first")
            golden.cases_of(None, plan)  # a bad file is told now
            version = self._make(source)
            if version.name == self._routing.old.name:
                raise Mistake(f"{source} is the version that runs already ({version.name})")
            await self._end_watch()
            (self._directory.path / KEYS).unlink(missing_ok=True)
            self.rollout = Rollout(source, plan)
            self._begin(version)
            self._tell("start", f"{plan.strategy} of {version.name} against {self._routing.old.name}")
            self._save(durable=True)
            return self.rollout.name

    async def promote(self, reason: str = "asked for") -> None:
        """The new version takes all traffic and becomes the old one. Raises Mistake."""
        async with self._acting:
            if self.rollout is None or self._routing.new is None:
                raise Mistake("there is no rollout to promote")
            if not self._routing.new.ready:
                raise Mistake(f"{self._routing.new.name} is not ready ({self._routing.new.reason})")
            await self._promote(Decision("promote", "asked", reason))

    async def rollback(self, reason: str = "asked for") -> str:
        """Back to the version before. Raises Mistake."""
        async with self._acting:
            if self.rollout is not None:
                await self._rollback(Decision("rollback", "asked", reason))
                return self._routing.old.name
            if self.watch is not None:
                await self._switch_back(Decision("rollback", "asked", reason))
                return self._routing.old.name
            source = self._previous_source
        if source is None:
            raise Mistake("there is no version to go back to")
        plan = Plan(strategy="blue-green", steps=(Step(100.0, 0.0, 0),), limits=Limits(p95_ms=None))
        await self.start(source, plan)
        return source

    def learn(self, labels: list[tuple[str, str]]) -> dict[str, int]:
        """Take labels of earlier predictions. Raises Mistake where no rollout is under way."""
        if self.rollout is None:
            raise Mistake("labels are compared during a rollout, and none is under way")
        return self.rollout.learn(labels)

    def status(self) -> dict[str, Any]:
        """Where everything stands."""
        routing, rollout = self._routing, self.rollout
        told: dict[str, Any] = {"phase": self._phase(), "versions": {"old": _described(routing.old)}}
        if routing.new is not None:
            told["versions"]["new"] = _described(routing.new)
        if self.watch is not None:
            told["versions"]["before"] = _described(self.watch.before)
            told["warm_seconds_left"] = round(self.watch.left(), 1)
        if rollout is not None:
            told["rollout"] = {
                "name": rollout.name,
                "strategy": rollout.plan.strategy,
                "step": rollout.step + 1,
                "steps": len(rollout.plan.steps),
                "percent": routing.weight * 100.0,
                "elapsed_seconds": round(rollout.elapsed, 1),
                "requests_of_step": rollout.requests,
                "requests": {"old": rollout.evidence.old.requests, "new": rollout.evidence.new.requests},
                "failed": {"old": rollout.evidence.old.failed, "new": rollout.evidence.new.failed},
                "shadowed": dict(rollout.shadowed),
                "findings": [vars(finding) for finding in rollout.findings()],
            }
        if self._hook.pending is not None:
            told["hook_pending"] = self._hook.pending
        return told

    # ---- the loop

    async def resume(self, state: dict[str, Any]) -> None:
        """Go on where an earlier front was; the old version is in the routing already."""
        self._previous_source = state.get("previous")
        self._hook.notify(state.get("hook_pending"))
        if state.get("rollout") is not None:
            self.rollout = Rollout.restore(state["rollout"])
            self._begin(self._make(self.rollout.source))
            self._routing.splitter.written()
            self._apply_step()
            self._tell("resume", f"goes on with step {self.rollout.step + 1} of {len(self.rollout.plan.steps)}")
        elif state.get("watch") is not None:
            self.watch = Watch.restore(self._make(state["watch"]["source"]), state["watch"])
            self.watch.before.start(self._say)
            self._tell("resume", f"keeps {self.watch.before.name} warm for {self.watch.left():.0f} s more")

    async def run(self) -> None:
        """Look, decide, act, for ever."""
        last = time.monotonic()
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), TICK_SECONDS)
            self._wake.clear()
            now_, before = time.monotonic(), last
            last = now_
            async with self._acting:
                await self._tick(now_ - before)

    async def close(self) -> None:
        """Write down where it stands, then end the versions that are ours."""
        if self.rollout is not None:
            self.rollout.weigh()
        self._write_records()
        self._save(durable=True)
        await self._hook.close()
        before = self.watch.before if self.watch is not None else None
        versions = [version for version in (self._routing.old, self._routing.new, before) if version is not None]
        await asyncio.gather(*(version.stop() for version in versions), *self._background, return_exceptions=True)

    async def _tick(self, passed: float) -> None:
        rollout, new = self.rollout, self._routing.new
        if rollout is not None and new is not None:
            if rollout.step < 0:
                await self._check_in(rollout, new)
            else:
                await self._advance(rollout, new, passed)
        elif self.watch is not None:
            await self._look_after(self.watch)
        self._write_records()
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self._save(durable=False)
        self._gauges()

    async def _check_in(self, rollout: Rollout, new: Version) -> None:
        """A version's way to its first step: ready, then golden requests."""
        if new.ready:
            await self._enter(rollout, new, 0)
            return
        crashes = rollout.crashes_before + new.crashes
        if crashes >= rollout.plan.limits.crashes or new.unready_seconds > START_SECONDS:
            await self._rollback(Decision("rollback", "start", f"it does not get ready: {new.reason}"))

    async def _advance(self, rollout: Rollout, new: Version, passed: float) -> None:
        weighed = rollout.weigh()
        if new.ready and self._routing.old.ready:
            rollout.elapsed += min(passed, 4.0 * TICK_SECONDS)  # a machine that slept has not held a step
        # A front that was started again starts it, too: then it may take as long as at first.
        patience = 0.0 if new.was_ready else START_SECONDS - rollout.plan.limits.unready_seconds
        decision = rollout.decide(new, new.unready_seconds - patience)
        match decision.action:
            case "rollback":
                await self._rollback(decision)
            case "promote":
                await self._promote(decision)
            case "advance":
                self._tell("advance", decision.reason, decision.figures)
                await self._enter(rollout, new, rollout.step + 1)
            case "hold" if decision.kind != rollout.held:
                rollout.held = decision.kind
                self._tell("hold", decision.reason, decision.figures if weighed else {})

    async def _enter(self, rollout: Rollout, new: Version, step: int) -> None:
        if rollout.plan.golden:
            replayed = await golden.replay(self._session, new, rollout.plan)
            if not replayed.ok:
                await self._rollback(Decision("rollback", "golden", replayed.text))
                return
            self._tell("golden", replayed.text)
        rollout.enter(step)
        self._apply_step()
        self._tell("step", f"step {step + 1} of {len(rollout.plan.steps)}: {self._routing.weight:.0%} of the traffic")
        self._save(durable=True)

    async def _look_after(self, watch: Watch) -> None:
        """After a promotion: hard limits still switch back; then the version before is ended."""
        worse = watch.weigh()
        if worse is not None and watch.before.ready:
            await self._switch_back(Decision("rollback", worse.test, worse.text, {worse.test: worse.figures}))
        elif watch.left() <= 0.0:
            self._tell("end", f"{watch.before.name} is no longer kept warm")
            await self._end_watch()
            self._save(durable=True)

    # ---- the acts

    def _begin(self, version: Version) -> None:
        assert self.rollout is not None
        self._routing.begin(version, self.rollout.plan, self.rollout.name)
        self.rollout.recall(self._directory, self._routing.splitter)
        version.start(self._say)

    def _apply_step(self) -> None:
        assert self.rollout is not None
        step = self.rollout.current
        self._routing.weight = step.percent / 100.0 if step is not None else 0.0
        self._routing.mirrors = step is not None and self.rollout.plan.mirrors

    async def _promote(self, decision: Decision) -> None:
        assert self.rollout is not None and self._routing.new is not None
        before, promoted, rollout = self._routing.old, self._routing.new, self.rollout
        self._write_records()
        self._routing.end(promoted)
        self._tell("promote", f"{promoted.name} takes all traffic: {decision.reason}", decision.figures)
        self._previous_source, self.rollout = before.source, None
        self.watch = Watch(before, rollout.plan, rollout.plan.keep_warm_seconds)
        self._notify("promoted", promoted)
        self._save(durable=True)

    async def _rollback(self, decision: Decision) -> None:
        assert self.rollout is not None and self._routing.new is not None
        new, rollout = self._routing.new, self.rollout
        self._write_records()
        self._routing.end(self._routing.old)
        counts = {"old": rollout.evidence.old.requests, "new": rollout.evidence.new.requests}
        self._tell("rollback", f"{new.name} is taken back: {decision.reason}", {**decision.figures, "requests": counts})
        self.rollout = None
        self._save(durable=True)
        self._retire(new)

    async def _switch_back(self, decision: Decision) -> None:
        assert self.watch is not None
        before, promoted = self.watch.before, self._routing.old
        if not before.ready:
            raise ServingError(f"{before.name} is not ready ({before.reason}); it can't take over")
        self._routing.end(before)
        self.watch, self._previous_source = None, None
        self._tell("rollback", f"{promoted.name} is taken back: {decision.reason}", decision.figures)
        self._notify("rolled_back", before)
        self._save(durable=True)
        self._retire(promoted)

    async def _end_watch(self) -> None:
        if self.watch is not None:
            watch, self.watch = self.watch, None
            self._retire(watch.before)

    def _retire(self, version: Version) -> None:
        task = asyncio.create_task(version.stop())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _notify(self, event: str, version: Version) -> None:
        run = version.bundle.run if version.bundle is not None else {}
        self._hook.notify({"event": event, "source": version.source, "version": version.name, "run": run})

    # ---- what is written down

    def _hook_told(self, action: str, figures: dict[str, Any]) -> None:
        text = f"told of {figures['version']} ({figures['event']})"
        self._tell(action, text if figures["ok"] else f"not yet {text}: {figures['error']}", figures)
        self._save(durable=True)

    def _tell(self, action: str, reason: str, figures: dict[str, Any] | None = None) -> None:
        rollout = self.rollout
        entry: dict[str, Any] = {"time": now(), "action": action, "reason": reason, "weight": self._routing.weight}
        if rollout is not None:
            entry |= {"rollout": rollout.name, "step": rollout.step + 1, "requests_of_step": rollout.requests}
        self._directory.append(LOG, [{**entry, "figures": figures or {}}])
        self._say(f"{action}: {reason}")

    def _write_records(self) -> None:
        if self.rollout is not None:
            self._directory.append(ASSIGNMENTS, self.rollout.records.assignments())
            self._directory.append_bytes(KEYS, self._routing.splitter.written())

    def _save(self, durable: bool) -> None:
        new = self._routing.new
        state = {
            "settings": self._settings,
            "source": self._routing.old.source,
            "previous": self._previous_source,
            "phase": self._phase(),
            "rollout": self.rollout.state(new.crashes if new is not None else 0) if self.rollout is not None else None,
            "watch": self.watch.state() if self.watch is not None else None,
            "hook_pending": self._hook.pending,
        }
        self._directory.write(state, durable)
        self._saved = time.monotonic()

    def _phase(self) -> str:
        if self.rollout is not None:
            return "checking" if self.rollout.step < 0 else "rolling"
        return "warm" if self.watch is not None else "steady"

    def _gauges(self) -> None:
        rollout = self.rollout
        self._metrics.gauges["rollout_weight"] = self._routing.weight
        self._metrics.gauges["rollout_step"] = float(rollout.step + 1) if rollout is not None else 0.0
        self._metrics.gauges["rollout_requests_in_flight"] = float(self._routing.old.in_flight)


def _described(version: Version) -> dict[str, Any]:
    return {
        "version": version.name,
        "source": version.source,
        "url": version.url,
        "ready": version.ready,
        "reason": version.reason,
        "pid": version.pid,
        "crashes": version.crashes,
    }

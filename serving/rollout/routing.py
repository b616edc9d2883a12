"""Who answers at the moment; the controller writes it, the proxy reads it for each request."""

from __future__ import annotations

from collections.abc import Mapping

from serving.rollout.plan import Plan
from serving.rollout.split import Route, Splitter
from serving.rollout.versions import Version


class Routing:
    """The versions and how the traffic is split between them."""

    def __init__(self, old: Version) -> None:
        self.old = old
        self.new: Version | None = None
        self.plan = Plan()
        self.splitter = Splitter(self.plan.split, "")
        self.weight = 0.0
        """Share of the new version, 0 to 1."""
        self.mirrors = False

    def begin(self, new: Version, plan: Plan, salt: str) -> None:
        """Make the splitter of a rollout; the new version gets nothing yet."""
        self.new, self.plan, self.splitter = new, plan, Splitter(plan.split, salt)
        self.weight, self.mirrors = 0.0, False

    def end(self, old: Version) -> None:
        """All traffic to this version, from now on."""
        self.old, self.new, self.weight, self.mirrors = old, None, 0.0, False

    def route(self, headers: Mapping[str, str], client: str) -> tuple[Version, Route]:
        """The version for a request, and how it was found."""
        new = self.new
        if new is None:
            return self.old, Route(False, None)
        route = self.splitter.route(headers, client, self.weight, (self.old.name, new.name))
        if route.is_new and not (new.ready and (self.weight > 0.0 or route.share is None)):
            return self.old, Route(False, None, route.key)
        if not new.ready:
            return self.old, Route(False, None, route.key)
        return (new if route.is_new else self.old), route

    def other(self, version: Version) -> Version | None:
        """Who may answer in place of a version that failed: the old one always, the new one once it has traffic."""
        if version is not self.old:
            return self.old
        return self.new if self.new is not None and self.new.ready and self.weight > 0.0 else None

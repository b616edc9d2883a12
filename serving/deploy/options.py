"""What may be chosen when files are rendered."""

from __future__ import annotations

import re
from dataclasses import dataclass

from serving.errors import Mistake

UID = 10001
"""Of the server in its image: a number, so that Kubernetes can see that it is not root."""
GRACE = 10
"""Seconds beyond the drain before a container is killed."""
UNDRAINED = 5
"""Seconds in which Kubernetes takes a pod out of its endpoints, before the server is told to drain."""


@dataclass(frozen=True)
class Options:
    """All of them; each target takes what it needs."""

    image: str
    """Name and tag of the server's image."""
    port: int = 8000
    replicas: int = 2
    """The fewest."""
    max_replicas: int = 10
    cpu: int = 2
    """Cores of one server."""
    memory: str = "2Gi"
    gpus: int = 0
    workers: int = 1
    """Processes that run the model, of one server."""
    max_batch: int = 32
    drain_seconds: int = 30
    base_image: str = ""
    """The image's first line; empty for a slim Python of the version here."""
    expose: str = "none"
    """`ingress`, `gateway` or `none`."""
    host: str = "model.example.com"
    namespace: str = "default"
    """Where one must be named: by the plugin that splits a Gateway's traffic."""
    gateway: str = "gateway"
    """Name of the Gateway that the route belongs to."""
    ingress_class: str = "nginx"
    ingress_namespace: str = "ingress"
    """Where the ingress controller or the gateway runs; its traffic is let in."""
    monitoring_namespace: str = "monitoring"
    prometheus: str = "http://prometheus-operated.monitoring.svc:9090"
    """Where the analysis of a canary asks."""
    api_keys: bool = False
    """The server asks for keys, which come from a secret."""
    max_errors: float = 0.001
    """Share of requests that may fail (5xx), over a month."""
    p95_ms: float = 500.0
    storage_uri: str = ""
    """KServe: where the bundle lies; empty where it is in the image."""

    @property
    def grace(self) -> int:
        """Seconds from the word to end until the kill."""
        return UNDRAINED + self.drain_seconds + GRACE

    def arguments(self, bundle: str = "/bundle", keys: str = "/run/secrets/api-keys") -> list[str]:
        """Of `python -m serving` in a container."""
        given = [bundle, "--host", "0.0.0.0", "--port", str(self.port), "--workers", str(self.workers)]
        given += ["--cores", str(self.cpu), "--max-batch", str(self.max_batch)]
        given += ["--drain-seconds", str(self.drain_seconds)]
        return [*given, "--api-keys", keys] if self.api_keys else given


def check(options: Options) -> None:
    """Raise Mistake for values that no target could use."""
    for name, least in (
        ("replicas", 1),
        ("cpu", 1),
        ("workers", 1),
        ("max_batch", 1),
        ("gpus", 0),
        ("drain_seconds", 0),
    ):
        if getattr(options, name) < least:
            raise Mistake(f"--{name.replace('_', '-')}: at least {least} is wanted, not {getattr(options, name)}")
    if options.max_replicas < options.replicas:
        raise Mistake(f"--max-replicas: {options.max_replicas} is fewer than --replicas {options.replicas}")
    if not 1024 <= options.port <= 65535:
        raise Mistake(f"--port: 1024 to 65535 is wanted (the server is not root), not {options.port}")
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?(Ki|Mi|Gi|Ti)", options.memory):
        raise Mistake(f"--memory: a number with Mi or Gi is wanted, not {options.memory!r}")
    if not 0 < options.max_errors < 1:
        raise Mistake(f"--max-errors: a share between 0 and 1 is wanted, not {options.max_errors}")
    if options.p95_ms <= 0:
        raise Mistake(f"--p95-ms: more than 0 is wanted, not {options.p95_ms}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*", options.image):
        raise Mistake(f"--image: {options.image!r} is no name of an image")
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", options.host):
        raise Mistake(f"--host: {options.host!r} is no host name")

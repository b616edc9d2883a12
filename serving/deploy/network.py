"""How requests reach the pods in Kubernetes, and how nothing else does."""

from __future__ import annotations

from typing import Any

from serving.deploy.facts import Facts
from serving.deploy.options import Options
from serving.deploy.pod import PORT, metadata, selector

NAMESPACE = "kubernetes.io/metadata.name"
"""The label that every namespace has."""


def service(facts: Facts, name: str = "") -> dict[str, Any]:
    """Port 80 of the cluster."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(facts, name),
        "spec": {
            "type": "ClusterIP",
            "selector": selector(facts),
            "ports": [{"name": PORT, "port": 80, "targetPort": PORT, "protocol": "TCP"}],
        },
    }


def ingress(facts: Facts, options: Options, backend: str = "") -> dict[str, Any]:
    """HTTPS from outside; the certificate comes from the secret NAME-tls."""
    target = {"service": {"name": backend or facts.label, "port": {"name": PORT}}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "Ingress",
        "metadata": metadata(facts),
        "spec": {
            "ingressClassName": options.ingress_class,
            "tls": [{"hosts": [options.host], "secretName": f"{facts.label}-tls"}],
            "rules": [
                {
                    "host": options.host,
                    "http": {"paths": [{"path": path, "pathType": "Prefix", "backend": target} for path in PUBLIC]},
                }
            ],
        },
    }


PUBLIC = ("/predict", "/models", "/v1", "/v2/models", "/docs", "/openapi.json", "/ready")
"""What is reached from outside: not /metrics, nor the repository's paths that reload a bundle."""


def http_route(facts: Facts, options: Options, backends: tuple[str, ...] = ()) -> dict[str, Any]:
    """A route of a Gateway, which ends TLS. Several backends share the traffic by weight, the first has all of it."""
    names = backends or (facts.label,)
    weighed = [{"name": name, "port": 80, "weight": 0 if place else 100} for place, name in enumerate(names)]
    alone = [{"name": names[0], "port": 80}]
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": metadata(facts),
        "spec": {
            "parentRefs": [{"name": options.gateway, "namespace": options.ingress_namespace}],
            "hostnames": [options.host],
            "rules": [
                {
                    "matches": [{"path": {"type": "PathPrefix", "value": path}} for path in PUBLIC],
                    "backendRefs": weighed if len(names) > 1 else alone,
                }
            ],
        },
    }


def network_policy(facts: Facts, options: Options) -> dict[str, Any]:
    """In: the same namespace, the ingress and Prometheus, to one port. Out: nothing at all."""
    sources: list[dict[str, Any]] = [{"podSelector": {}}]
    namespaces = [options.monitoring_namespace]
    if options.expose != "none":
        namespaces.insert(0, options.ingress_namespace)
    sources += [{"namespaceSelector": {"matchLabels": {NAMESPACE: name}}} for name in namespaces]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(facts),
        "spec": {
            "podSelector": {"matchLabels": selector(facts)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": sources, "ports": [{"port": PORT, "protocol": "TCP"}]}],
            "egress": [],
        },
    }

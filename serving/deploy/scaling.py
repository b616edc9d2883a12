"""How many pods: the autoscaler on requests in flight, the metric it reads, and how many may be gone at once."""

from __future__ import annotations

from typing import Any

from serving.deploy.facts import Facts
from serving.deploy.options import Options
from serving.deploy.pod import metadata, selector

METRIC = "serving_requests_in_flight"


def in_flight_target(facts: Facts, options: Options) -> int:
    """Requests in flight at which one more pod is wanted: as measured, else half of what fills a batch per worker."""
    return facts.in_flight or max(1, options.max_batch * options.workers // 2)


def why_target(facts: Facts, options: Options) -> str:
    """Where the number comes from, for the comment beside it."""
    target = in_flight_target(facts, options)
    if facts.in_flight:
        return (
            f"{target} requests in flight per pod: the capacity card of the bundle (measured on {facts.measured_on})."
        )
    return (
        f"{target} requests in flight per pod is NOT measured: half of the batches of all workers. The bundle has no\n"
        "capacity card; find your number with: trainer loadtest"
    )


def autoscaler(facts: Facts, options: Options, kind: str = "Deployment", version: str = "apps/v1") -> dict[str, Any]:
    """Grows at once, shrinks after five quiet minutes."""
    metric = {
        "metric": {"name": METRIC},
        "target": {"type": "AverageValue", "averageValue": str(in_flight_target(facts, options))},
    }
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": metadata(facts),
        "spec": {
            "scaleTargetRef": {"apiVersion": version, "kind": kind, "name": facts.label},
            "minReplicas": options.replicas,
            "maxReplicas": options.max_replicas,
            "metrics": [{"type": "Pods", "pods": metric}],
            "behavior": {
                "scaleUp": {
                    "stabilizationWindowSeconds": 0,
                    "policies": [{"type": "Percent", "value": 100, "periodSeconds": 30}],
                },
                "scaleDown": {
                    "stabilizationWindowSeconds": 300,
                    "policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}],
                },
            },
        },
    }


def adapter_rules() -> dict[str, Any]:
    """Helm values of prometheus-adapter: the gauge as a metric of pods, averaged over a minute."""
    return {
        "rules": {
            "custom": [
                {
                    "seriesQuery": f'{METRIC}{{namespace!="",pod!=""}}',
                    "resources": {"overrides": {"namespace": {"resource": "namespace"}, "pod": {"resource": "pod"}}},
                    "name": {"as": METRIC},
                    "metricsQuery": "sum(avg_over_time(<<.Series>>{<<.LabelMatchers>>}[1m])) by (<<.GroupBy>>)",
                }
            ]
        }
    }


def disruption_budget(facts: Facts) -> dict[str, Any]:
    """One pod at a time may be taken by drains of nodes; a pod that is not ready may always go."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata(facts),
        "spec": {
            "maxUnavailable": 1,
            "selector": {"matchLabels": selector(facts)},
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    }

"""The files of a Kubernetes folder that do not depend on who keeps the pods: a Deployment or a Rollout."""

from __future__ import annotations

from typing import Any

from serving.deploy import monitoring, network, pod, scaling
from serving.deploy.facts import Facts
from serving.deploy.options import Options
from serving.deploy.yaml_text import yaml_text

OUTSIDE = ("prometheus-adapter-values.yaml",)
"""Files that belong to something else than the namespace of the server."""


def common(facts: Facts, options: Options) -> dict[str, str]:
    """Account, settings, network policy, budget, monitoring."""
    return {
        "serviceaccount.yaml": yaml_text(
            "An account without a token: the server never talks to Kubernetes.", _account(facts)
        ),
        "configmap.yaml": yaml_text(
            "The server's settings; apply deployment.yaml anew, too.", pod.config_map(facts, options)
        ),
        "networkpolicy.yaml": yaml_text(
            "One port is open to the namespace, the ingress and Prometheus; the server itself reaches nothing.\n"
            "Change the names of namespaces with --ingress-namespace and --monitoring-namespace.",
            network.network_policy(facts, options),
        ),
        "poddisruptionbudget.yaml": yaml_text(
            "Drains of nodes take one pod at a time.", scaling.disruption_budget(facts)
        ),
        "prometheus-adapter-values.yaml": yaml_text(
            "Makes serving_requests_in_flight a metric that the autoscaler can read. Once per cluster:\n"
            "  helm upgrade prometheus-adapter prometheus-community/prometheus-adapter --reuse-values -f THIS\n"
            "Not part of kustomization.yaml.",
            scaling.adapter_rules(),
        ),
        "servicemonitor.yaml": yaml_text("Needs the Prometheus operator.", _service_monitor(facts)),
        "prometheusrule.yaml": yaml_text(
            "When somebody is told; needs the Prometheus operator. Change thresholds with --max-errors, --p95-ms.",
            _prometheus_rule(facts, options),
        ),
        "dashboard.yaml": yaml_text(
            "Grafana's dashboard, for the sidecar that looks for this label.", _dashboard(facts)
        ),
    }


def kustomization(about: str, files: dict[str, str]) -> str:
    """The list of what belongs together; `images` is where a pipeline writes a new tag."""
    resources = sorted(path for path in files if path not in OUTSIDE)
    return yaml_text(
        about, {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": resources}
    )


def _account(facts: Facts) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": pod.metadata(facts),
        "automountServiceAccountToken": False,
    }


def _service_monitor(facts: Facts) -> dict[str, Any]:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "ServiceMonitor",
        "metadata": pod.metadata(facts),
        "spec": {
            "jobLabel": "app.kubernetes.io/name",
            "selector": {"matchLabels": pod.selector(facts)},
            # Which ReplicaSet a pod is of: what a canary is told apart by.
            "podTargetLabels": ["rollouts-pod-template-hash"],
            "endpoints": [
                {
                    "port": pod.PORT,
                    "path": "/metrics",
                    "interval": f"{monitoring.SCRAPE_SECONDS}s",
                    "scrapeTimeout": "5s",
                }
            ],
        },
    }


def _prometheus_rule(facts: Facts, options: Options) -> dict[str, Any]:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": pod.metadata(facts),
        "spec": {"groups": monitoring.alert_groups(facts, options)},
    }


def _dashboard(facts: Facts) -> dict[str, Any]:
    meta = pod.metadata(facts, f"{facts.label}-dashboard")
    meta["labels"] = {**meta["labels"], "grafana_dashboard": "1"}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": meta,
        "data": {f"{facts.label}.json": monitoring.dashboard(facts)},
    }

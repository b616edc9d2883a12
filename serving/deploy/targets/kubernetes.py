"""A Deployment with all that production asks of it, one file an object, put together by kustomization.yaml."""

from __future__ import annotations

from typing import Any

from serving.deploy import cluster, network, pod, scaling
from serving.deploy.facts import Facts
from serving.deploy.options import Options
from serving.deploy.yaml_text import yaml_text


def render(facts: Facts, options: Options) -> dict[str, str]:
    """All objects but the namespace, which is the user's."""
    files = {
        "deployment.yaml": yaml_text(_about(facts, options), _deployment(facts, options)),
        "service.yaml": yaml_text("Port 80 of the cluster.", network.service(facts)),
        "hpa.yaml": yaml_text(
            f"{scaling.why_target(facts, options)}\nNeeds the rule in prometheus-adapter-values.yaml.",
            scaling.autoscaler(facts, options),
        ),
        **cluster.common(facts, options),
    }
    if options.expose == "ingress":
        about = f"HTTPS from outside; the certificate is the secret {facts.label}-tls."
        files["ingress.yaml"] = yaml_text(about, network.ingress(facts, options))
    elif options.expose == "gateway":
        about = "A route of your Gateway, which ends TLS; name it with --gateway, --ingress-namespace."
        files["httproute.yaml"] = yaml_text(about, network.http_route(facts, options))
    about = (
        f"Serves {facts.name} {facts.version}.\n\n"
        "  look     kubectl kustomize .\n"
        "  apply    kubectl apply --server-side -n NAMESPACE -k .\n"
        f"  wait     kubectl rollout status -n NAMESPACE deployment/{facts.label}\n"
        f"  undo     kubectl rollout undo -n NAMESPACE deployment/{facts.label}\n\n"
        "Take servicemonitor.yaml and prometheusrule.yaml out where there is no Prometheus operator."
    )
    return {"kustomization.yaml": cluster.kustomization(about, files), **files}


def _about(facts: Facts, options: Options) -> str:
    text = (
        f"The server's pods. Change: image (now {options.image}; pin it by digest), resources.\n"
        f"A pod gets traffic once its golden requests are answered as in training, within {facts.starts_within} s."
    )
    if options.api_keys:
        text += (
            f"\nKeys, one a line: kubectl create secret generic {facts.label}-api-keys --from-file={pod.KEYS_ITEM}=FILE"
        )
    return text


def _deployment(facts: Facts, options: Options) -> dict[str, Any]:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": pod.metadata(facts),
        # Without `replicas`: the autoscaler's number would be overwritten by every apply.
        "spec": {
            "revisionHistoryLimit": 5,
            "progressDeadlineSeconds": facts.starts_within * 2,
            "minReadySeconds": 5,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "selector": {"matchLabels": pod.selector(facts)},
            "template": pod.template(facts, options),
        },
    }

"""A Rollout instead of a Deployment: 10 %, 50 %, all of the traffic, each step judged against the old version."""

from __future__ import annotations

from typing import Any

from serving.deploy import cluster, network, pod, scaling
from serving.deploy.facts import Facts
from serving.deploy.options import UID, Options
from serving.deploy.yaml_text import yaml_text

STEPS = (10, 50)
"""Per cent of the traffic; after the last analysis the new version gets all."""
HASH = "rollouts_pod_template_hash"
"""Label in Prometheus that tells the versions apart, from the pods' label of that name."""
HOLD_SECONDS, TIMEOUT_SECONDS, MINIMUM_REQUESTS = 600, 3600, 500
"""Of the analysis at each step."""


def render(facts: Facts, options: Options) -> dict[str, str]:
    """The folder of `kubernetes` with a Rollout, an AnalysisTemplate and a service for the canary."""
    routed = options.expose != "none"
    files = {
        "rollout.yaml": yaml_text(_about(options), _rollout(facts, options)),
        "analysistemplate.yaml": yaml_text(
            "A job that watches both versions in Prometheus and fails as soon as the new one is worse: that undoes\n"
            f"the rollout. It reads {options.prometheus}: change with --prometheus.",
            _analysis(facts, options),
        ),
        "service.yaml": yaml_text(
            "Port 80 of the cluster; the old version's while a rollout goes on.", network.service(facts)
        ),
        "hpa.yaml": yaml_text(
            f"{scaling.why_target(facts, options)}\nNeeds the rule in prometheus-adapter-values.yaml.",
            scaling.autoscaler(facts, options, "Rollout", "argoproj.io/v1alpha1"),
        ),
        **cluster.common(facts, options),
    }
    if routed:
        files["service-canary.yaml"] = yaml_text(
            "The new version's, while a rollout goes on.", network.service(facts, _canary(facts))
        )
    if options.expose == "ingress":
        about = (
            f"HTTPS from outside; the certificate is the secret {facts.label}-tls. The controller adds the canary's."
        )
        files["ingress.yaml"] = yaml_text(about, network.ingress(facts, options))
    elif options.expose == "gateway":
        about = "A route of your Gateway, whose weights the controller sets."
        files["httproute.yaml"] = yaml_text(about, network.http_route(facts, options, (facts.label, _canary(facts))))
    about = (
        f"Serves {facts.name} {facts.version}; a new image goes out by steps. Needs Argo Rollouts and Prometheus.\n\n"
        "  look     kubectl kustomize .\n"
        "  apply    kubectl apply --server-side -n NAMESPACE -k .\n"
        f"  watch    kubectl argo rollouts get rollout -n NAMESPACE {facts.label} --watch\n"
        f"  undo     kubectl argo rollouts abort -n NAMESPACE {facts.label}"
    )
    return {"kustomization.yaml": cluster.kustomization(about, files), **files}


def _about(options: Options) -> str:
    how = {
        "none": "Without a traffic router the steps are shares of the pods: --replicas 10 makes 10 % one pod of ten.",
        "ingress": "The nginx ingress controller splits the traffic.",
        "gateway": "The Gateway splits the traffic; the controller needs the plugin argoproj-labs/gatewayAPI, and the\n"
        "namespace below must be this one.",
    }[options.expose]
    return f"The server's pods. Change: image (now {options.image}; pin it by digest), resources, steps.\n{how}"


def _canary(facts: Facts) -> str:
    return f"{facts.label}-canary"


def _rollout(facts: Facts, options: Options) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    for weight in STEPS:
        steps += [{"setWeight": weight}, {"analysis": _analysis_step(facts)}]
    canary: dict[str, Any] = {"maxUnavailable": 0, "maxSurge": 1, "steps": steps}
    if options.expose != "none":
        canary["stableService"] = facts.label
        canary["canaryService"] = _canary(facts)
        canary["trafficRouting"] = _routing(facts, options)
    return {
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "Rollout",
        "metadata": pod.metadata(facts),
        "spec": {
            "revisionHistoryLimit": 5,
            "progressDeadlineSeconds": facts.starts_within * 2,
            "progressDeadlineAbort": True,
            "minReadySeconds": 5,
            "selector": {"matchLabels": pod.selector(facts)},
            "strategy": {"canary": canary},
            "template": pod.template(facts, options),
        },
    }


def _routing(facts: Facts, options: Options) -> dict[str, Any]:
    if options.expose == "ingress":
        return {"nginx": {"stableIngress": facts.label}}
    route = {"httpRoute": facts.label, "namespace": options.namespace}
    return {"plugins": {"argoproj-labs/gatewayAPI": route}}


def _analysis_step(facts: Facts) -> dict[str, Any]:
    return {
        "templates": [{"templateName": facts.label}],
        "args": [
            {"name": "old", "valueFrom": {"podTemplateHashValue": "Stable"}},
            {"name": "new", "valueFrom": {"podTemplateHashValue": "Latest"}},
        ],
    }


def _analysis(facts: Facts, options: Options) -> dict[str, Any]:
    return {
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "AnalysisTemplate",
        "metadata": pod.metadata(facts),
        "spec": {
            "args": [{"name": "old"}, {"name": "new"}],
            "metrics": [{"name": "no-worse", "provider": {"job": {"spec": _job(facts, options)}}}],
        },
    }


def _job(facts: Facts, options: Options) -> dict[str, Any]:
    return {
        "activeDeadlineSeconds": TIMEOUT_SECONDS + 300,
        "backoffLimit": 2,
        # A verdict is final; a lost node or a Prometheus that is away is tried again.
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": {"containerName": "analysis", "operator": "In", "values": [1]}}
            ]
        },
        "template": {
            # Not the server's labels: its services and its network policy must not find this pod.
            "metadata": {
                "labels": {"app.kubernetes.io/part-of": facts.label, "app.kubernetes.io/component": "analysis"}
            },
            "spec": {
                "restartPolicy": "Never",
                "serviceAccountName": facts.label,
                "automountServiceAccountToken": False,
                "securityContext": {
                    "runAsNonRoot": True,
                    "runAsUser": UID,
                    "runAsGroup": UID,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "containers": [
                    {
                        "name": "analysis",
                        "image": options.image,
                        "command": _command(facts, options),
                        "resources": {
                            "requests": {"cpu": "50m", "memory": "128Mi"},
                            "limits": {"memory": "128Mi"},
                        },
                        "securityContext": pod.restricted(),
                    }
                ],
            },
        },
    }


def _command(facts: Facts, options: Options) -> list[str]:
    return [
        "python",
        "-m",
        "serving.deploy.analysis",
        f"--prometheus={options.prometheus}",
        f"--model={facts.name}",
        f"--by={HASH}",
        "--old={{args.old}}",
        "--new={{args.new}}",
        f"--hold-seconds={HOLD_SECONDS}",
        f"--minimum-requests={MINIMUM_REQUESTS}",
        f"--timeout-seconds={TIMEOUT_SECONDS}",
        f"--p95-ms={options.p95_ms:g}",
    ]

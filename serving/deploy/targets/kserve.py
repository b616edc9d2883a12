"""KServe's InferenceService: our server as its own predictor, asked by the Open Inference Protocol v2."""

from __future__ import annotations

from typing import Any

from serving.deploy import pod, scaling
from serving.deploy.facts import Facts
from serving.deploy.options import UID, Options
from serving.deploy.yaml_text import yaml_text

CONTAINER = "kserve-container"
"""The name by which KServe knows the predictor."""
MOUNTED = "/mnt/models"
"""Where KServe puts what it has loaded from STORAGE_URI."""
PORT = "http1"
"""Knative's name for plain HTTP."""


def render(facts: Facts, options: Options) -> dict[str, str]:
    """One file."""
    where = (
        f"The bundle is loaded from {options.storage_uri}." if options.storage_uri else "The bundle is in the image."
    )
    about = (
        f"Serves {facts.name} {facts.version}. {where}\n"
        f"{scaling.why_target(facts, options)}\n\n"
        "  apply    kubectl apply -n NAMESPACE -f inferenceservice.yaml\n"
        f"  try      curl http://ADDRESS/v2/models/{facts.name}\n"
        "  canary   set canaryTrafficPercent: 10 together with the new image\n\n"
        "Scales on requests in flight by Knative. In mode Standard, which has no such metric, change the annotation,\n"
        "and scaleMetric to cpu with scaleTarget 70."
    )
    return {"inferenceservice.yaml": yaml_text(about, _service(facts, options))}


def _service(facts: Facts, options: Options) -> dict[str, Any]:
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": pod.metadata(facts, annotations={"serving.kserve.io/deploymentMode": "Knative"}),
        "spec": {
            "predictor": {
                "minReplicas": options.replicas,
                "maxReplicas": options.max_replicas,
                "scaleMetric": "concurrency",
                "scaleTarget": scaling.in_flight_target(facts, options),
                "timeout": 60,
                "containers": [_container(facts, options)],
                "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "256Mi"}}],
            }
        },
    }


def _container(facts: Facts, options: Options) -> dict[str, Any]:
    environment = [{"name": "PROTOCOL", "value": "v2"}]
    if options.storage_uri:
        environment.append({"name": "STORAGE_URI", "value": options.storage_uri})
    probes = pod.probes(facts)
    for probe in probes.values():
        probe["httpGet"]["port"] = options.port
    return {
        "name": CONTAINER,
        "image": options.image,
        "args": options.arguments(MOUNTED if options.storage_uri else "/bundle"),
        "env": environment,
        "ports": [{"name": PORT, "containerPort": options.port, "protocol": "TCP"}],
        # Knative has no startup probe of its own: a revision's deadline is its progress deadline.
        "readinessProbe": probes["readinessProbe"],
        "resources": pod.resources(options),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": UID,
            "runAsGroup": UID,
            "seccompProfile": {"type": "RuntimeDefault"},
            **pod.restricted(),
        },
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }

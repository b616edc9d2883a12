"""Azure Machine Learning: a managed online endpoint with our server as its own container."""

from __future__ import annotations

from typing import Any

from serving.deploy import scaling
from serving.deploy.facts import Facts
from serving.deploy.options import Options
from serving.deploy.targets import docker
from serving.deploy.yaml_text import yaml_text

CONTEXT = "image"
SCHEMAS = "https://azuremlschemas.azureedge.net/latest"
INSTANCE, GPU_INSTANCE = "Standard_F2s_v2", "Standard_NC4as_T4_v3"
NAME_LENGTH = 32
"""Of endpoints and deployments."""


def render(facts: Facts, options: Options) -> dict[str, str]:
    """The build context, endpoint.yml and deployment.yml."""
    endpoint, deployment = facts.label[:NAME_LENGTH].rstrip("-"), f"v-{facts.version}"
    about = (
        f"Serves {facts.name} {facts.version}. {scaling.why_target(facts, options)}\n\n"
        f"  build    docker build -t {options.image} image, and push it to the workspace's registry\n"
        "  apply    az ml online-endpoint create --file endpoint.yml\n"
        "           az ml online-deployment create --file deployment.yml\n"
        f"  try      az ml online-endpoint invoke --name {endpoint} --deployment-name {deployment} \\\n"
        "             --request-file request.json\n"
        f"  canary   az ml online-endpoint update --name {endpoint} --traffic {deployment}=10 OLD=90\n\n"
        "Before it gets traffic a deployment answers only requests that name it. Change: image, instance_type."
    )
    return {
        "endpoint.yml": yaml_text("The address; apply once.", _endpoint(facts, endpoint)),
        "deployment.yml": yaml_text(about, _deployment(facts, options, endpoint, deployment)),
        **{f"{CONTEXT}/{path}": text for path, text in docker.render(facts, options).items()},
    }


def _endpoint(facts: Facts, name: str) -> dict[str, Any]:
    return {
        "$schema": f"{SCHEMAS}/managedOnlineEndpoint.schema.json",
        "name": name,
        "description": f"Serves {facts.name}",
        "auth_mode": "aad_token",
        "tags": {"model": facts.name},
    }


def _deployment(facts: Facts, options: Options, endpoint: str, name: str) -> dict[str, Any]:
    def route(path: str) -> dict[str, Any]:
        return {"port": options.port, "path": path}

    probe = {"period": 10, "timeout": 5, "success_threshold": 1}
    return {
        "$schema": f"{SCHEMAS}/managedOnlineDeployment.schema.json",
        "name": name,
        "endpoint_name": endpoint,
        "environment": {
            "name": facts.label,
            "version": facts.version,
            "image": options.image,
            "inference_config": {
                "liveness_route": route("/health"),
                "readiness_route": route("/ready"),
                "scoring_route": route("/predict"),
            },
        },
        "instance_type": GPU_INSTANCE if options.gpus else INSTANCE,
        "instance_count": options.replicas,
        "request_settings": {
            "request_timeout_ms": 10000,
            # Twice what one server is meant to hold: more waits in front of it, and is scaled for.
            "max_concurrent_requests_per_instance": 2 * scaling.in_flight_target(facts, options),
        },
        "liveness_probe": {**probe, "initial_delay": 10, "failure_threshold": 3},
        "readiness_probe": {**probe, "initial_delay": 5, "failure_threshold": facts.starts_within // 10},
        "tags": {"version": facts.version, "runtime": facts.runtime},
    }

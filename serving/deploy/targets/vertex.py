"""Google's Vertex AI: bodies of three requests, whose routes are the server's own; `/predict` speaks its form."""

from __future__ import annotations

import json
from typing import Any

from serving.deploy.facts import Facts
from serving.deploy.options import Options
from serving.deploy.targets import docker

CONTEXT = "image"
MACHINE, GPU_MACHINE, GPU = "n2-standard-2", "g2-standard-4", "NVIDIA_L4"
LIMIT_MB = 1.5
"""Of a request and an answer."""


def render(facts: Facts, options: Options) -> dict[str, str]:
    """The build context, model.json, endpoint.json, deploy.json, and what to do with them."""
    context = docker.render(facts, options)
    return {
        "README.md": _readme(facts, options),
        "model.json": _json(_model(facts, options)),
        "endpoint.json": _json({"displayName": facts.label, "labels": _labels(facts)}),
        "deploy.json": _json(_deploy(facts, options)),
        **{f"{CONTEXT}/{path}": text for path, text in context.items()},
    }


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _labels(facts: Facts) -> dict[str, str]:
    return {"model": facts.label, "version": f"v{facts.version}"}


def _model(facts: Facts, options: Options) -> dict[str, Any]:
    """Of `models:upload`. Vertex sets AIP_HTTP_PORT, AIP_HEALTH_ROUTE and AIP_PREDICT_ROUTE from this."""
    return {
        "model": {
            "displayName": facts.label,
            "versionDescription": f"{facts.name} {facts.version}, {facts.runtime}, {facts.dtype}",
            "labels": _labels(facts),
            "containerSpec": {
                "imageUri": options.image,
                "args": options.arguments(),
                "ports": [{"containerPort": options.port}],
                "predictRoute": "/predict",
                "healthRoute": "/ready",
                "deploymentTimeout": f"{facts.starts_within * 2}s",
            },
        }
    }


def _deploy(facts: Facts, options: Options) -> dict[str, Any]:
    """Of `endpoints/ID:deployModel`."""
    machine: dict[str, Any] = {"machineType": GPU_MACHINE if options.gpus else MACHINE}
    metric = "aiplatform.googleapis.com/prediction/online/cpu/utilization"
    if options.gpus:
        machine |= {"acceleratorType": GPU, "acceleratorCount": options.gpus}
        metric = "aiplatform.googleapis.com/prediction/online/accelerator/duty_cycle"
    return {
        "deployedModel": {
            "model": "projects/PROJECT/locations/REGION/models/MODEL",
            "displayName": f"{facts.label}-{facts.version}",
            "dedicatedResources": {
                "machineSpec": machine,
                "minReplicaCount": options.replicas,
                "maxReplicaCount": options.max_replicas,
                "autoscalingMetricSpecs": [{"metricName": metric, "target": 60}],
            },
        },
        "trafficSplit": {"0": 100},
    }


def _readme(facts: Facts, options: Options) -> str:
    post = (
        'curl -X POST -H "Authorization: Bearer $(gcloud auth print-access-token)" -H "Content-Type: application/json"'
    )
    base = "https://REGION-aiplatform.googleapis.com/v1/projects/PROJECT/locations/REGION"
    return f"""# {facts.name} {facts.version} on Vertex AI

Change REGION and PROJECT; `model.json` holds the image's name, `deploy.json` the machine and how many.

```sh
docker build -t {options.image} image && docker push {options.image}
{post} -d @model.json {base}/models:upload
{post} -d @endpoint.json {base}/endpoints
```

The first two requests answer with operations, which name the model and the endpoint: write the model's into
`deploy.json`, and ENDPOINT below.

```sh
{post} -d @deploy.json {base}/endpoints/ENDPOINT:deployModel
gcloud ai endpoints predict ENDPOINT --region=REGION --json-request=request.json
```

`request.json` is what `POST /predict` takes: `{{"instances": [...], "parameters": {{"top": 3}}}}`. Vertex takes at most
{LIMIT_MB} MB a request.

A canary: `"trafficSplit": {{"0": 10, "ID OF THE OLD ONE": 90}}` in `deploy.json`; back: `gcloud ai endpoints update
ENDPOINT --traffic-split=OLD=100`.
"""

"""The pod of a server, which a Deployment and a Rollout share."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from serving.deploy.facts import Facts
from serving.deploy.options import UID, UNDRAINED, Options

PORT = "http"
"""The name of the container's and the services' port."""
STARTUP_PERIOD = 5
KEYS_FOLDER = "/run/secrets/serving"
KEYS_ITEM = "api-keys"


def metadata(facts: Facts, name: str = "", **more: Any) -> dict[str, Any]:
    """Name and the recommended labels of an object."""
    return {"name": name or facts.label, "labels": labels(facts), **more}


def labels(facts: Facts) -> dict[str, str]:
    """Of every object."""
    return {**selector(facts), "app.kubernetes.io/version": facts.version, "app.kubernetes.io/component": "serving"}


def selector(facts: Facts) -> dict[str, str]:
    """What finds the pods; never changes, or a Deployment could not be updated."""
    return {"app.kubernetes.io/name": facts.label}


def config_map(facts: Facts, options: Options) -> dict[str, Any]:
    """The server's settings, which the pod's arguments refer to."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(facts),
        "data": settings(options),
    }


def settings(options: Options) -> dict[str, str]:
    """Environment variable -> value."""
    return {
        "SERVING_WORKERS": str(options.workers),
        "SERVING_CORES": str(options.cpu),
        "SERVING_MAX_BATCH": str(options.max_batch),
        "SERVING_DRAIN_SECONDS": str(options.drain_seconds),
    }


def template(facts: Facts, options: Options) -> dict[str, Any]:
    """The pod template: labels and spec."""
    digest = hashlib.sha256(json.dumps(settings(options), sort_keys=True).encode()).hexdigest()[:16]
    return {
        "metadata": {
            "labels": labels(facts),
            # New settings make new pods; a changed ConfigMap alone would not.
            "annotations": {"serving/settings": digest},
        },
        "spec": {
            "serviceAccountName": facts.label,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": options.grace,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": UID,
                "runAsGroup": UID,
                "fsGroup": UID,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "topologySpreadConstraints": [
                _spread(facts, key) for key in ("topology.kubernetes.io/zone", "kubernetes.io/hostname")
            ],
            "containers": [container(facts, options)],
            "volumes": _volumes(facts, options),
        },
    }


def container(facts: Facts, options: Options) -> dict[str, Any]:
    """The server in its pod."""
    return {
        "name": "server",
        "image": options.image,
        "args": _arguments(options),
        "envFrom": [{"configMapRef": {"name": facts.label}}],
        "ports": [{"name": PORT, "containerPort": options.port, "protocol": "TCP"}],
        **probes(facts),
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(UNDRAINED)]}}},
        "resources": resources(options),
        "securityContext": restricted(),
        "volumeMounts": _mounts(options),
    }


def probes(facts: Facts) -> dict[str, Any]:
    """Ready once the golden requests are answered right; live as long as the front answers."""
    return {
        "startupProbe": {
            "httpGet": {"path": "/ready", "port": PORT},
            "periodSeconds": STARTUP_PERIOD,
            "timeoutSeconds": 3,
            "failureThreshold": facts.starts_within // STARTUP_PERIOD,
        },
        "readinessProbe": {
            "httpGet": {"path": "/ready", "port": PORT},
            "periodSeconds": 5,
            "timeoutSeconds": 3,
            "failureThreshold": 2,
        },
        "livenessProbe": {
            "httpGet": {"path": "/health", "port": PORT},
            "periodSeconds": 10,
            "timeoutSeconds": 5,
            "failureThreshold": 3,
        },
    }


def resources(options: Options) -> dict[str, Any]:
    """No limit on the CPU: throttling would show as latency, and the server is told the cores that it asked for."""
    limits: dict[str, Any] = {"memory": options.memory}
    if options.gpus:
        limits["nvidia.com/gpu"] = str(options.gpus)
    return {"requests": {"cpu": str(options.cpu), "memory": options.memory}, "limits": limits}


def restricted() -> dict[str, Any]:
    """A container by the Pod Security Standard `restricted`, and with a root file system that can't be written."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def _arguments(options: Options) -> list[str]:
    arguments = ["/bundle", "--host", "0.0.0.0", "--port", str(options.port), "--workers", "$(SERVING_WORKERS)"]
    arguments += ["--cores", "$(SERVING_CORES)", "--max-batch", "$(SERVING_MAX_BATCH)"]
    arguments += ["--drain-seconds", "$(SERVING_DRAIN_SECONDS)"]
    return [*arguments, "--api-keys", f"{KEYS_FOLDER}/{KEYS_ITEM}"] if options.api_keys else arguments


def _spread(facts: Facts, key: str) -> dict[str, Any]:
    return {
        "maxSkew": 1,
        "topologyKey": key,
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": selector(facts)},
    }


def _volumes(facts: Facts, options: Options) -> list[dict[str, Any]]:
    volumes: list[dict[str, Any]] = [{"name": "tmp", "emptyDir": {"sizeLimit": "256Mi"}}]
    if options.api_keys:
        volumes.append({"name": "keys", "secret": {"secretName": f"{facts.label}-api-keys", "defaultMode": 0o440}})
    return volumes


def _mounts(options: Options) -> list[dict[str, Any]]:
    mounts: list[dict[str, Any]] = [{"name": "tmp", "mountPath": "/tmp"}]
    if options.api_keys:
        mounts.append({"name": "keys", "mountPath": KEYS_FOLDER, "readOnly": True})
    return mounts

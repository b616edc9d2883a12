"""One machine: the server with Prometheus, Alertmanager and Grafana, by Docker Compose."""

from __future__ import annotations

from typing import Any

from serving.deploy import monitoring
from serving.deploy.facts import Facts
from serving.deploy.options import Options
from serving.deploy.targets import docker
from serving.deploy.yaml_text import yaml_text

CONTEXT = "image"
"""Folder of the server's build context."""
PROMETHEUS = "prom/prometheus:v3.5.0"
ALERTMANAGER = "prom/alertmanager:v0.28.1"
GRAFANA = "grafana/grafana:12.1.0"
WEBHOOK = "/run/secrets/alert-webhook"
ADMIN = "/run/secrets/grafana-admin"


def render(facts: Facts, options: Options) -> dict[str, str]:
    """compose.yaml, the image's build context, and the configs of what watches the server."""
    context = docker.render(facts, options)
    about = (
        f"Serves {facts.name} {facts.version} here, watched by Prometheus, Alertmanager and Grafana.\n\n"
        "  apply    docker compose up --build --detach --wait\n"
        f"  try      curl http://127.0.0.1:{options.port}/ready\n"
        "  look     http://127.0.0.1:3000 (Grafana), http://127.0.0.1:9090 (Prometheus)\n\n"
        "Before: write the address that alerts are posted to into secrets/alert-webhook, and Grafana's password into\n"
        f"secrets/grafana-admin{' and one API key a line into secrets/api-keys' if options.api_keys else ''};\n"
        "the containers read them as files. All ports are this machine's own: put a proxy with TLS in front."
    )
    rules = {"groups": monitoring.alert_groups(facts, options)}
    return {
        "compose.yaml": yaml_text(about, _compose(facts, options)),
        **{f"{CONTEXT}/{path}": text for path, text in context.items()},
        "prometheus/prometheus.yml": yaml_text(
            "What Prometheus scrapes, and whom it tells.",
            monitoring.prometheus_config(
                facts, options, f"server:{options.port}", "/etc/prometheus/alerts.yml", "alertmanager:9093"
            ),
        ),
        "prometheus/alerts.yml": yaml_text(
            "When somebody is told; change thresholds with --max-errors, --p95-ms.", rules
        ),
        "alertmanager/alertmanager.yml": yaml_text(
            "Whom Alertmanager tells; the address is in secrets/alert-webhook (Alertmanager 0.26 or later).",
            monitoring.alertmanager_config(WEBHOOK),
        ),
        "grafana/provisioning/datasources/prometheus.yaml": yaml_text(
            "Grafana's data source.", monitoring.grafana_datasource("http://prometheus:9090")
        ),
        "grafana/provisioning/dashboards/serving.yaml": yaml_text(
            "Where Grafana's dashboards lie.", monitoring.grafana_provider("/etc/grafana/dashboards")
        ),
        "grafana/dashboards/serving.json": monitoring.dashboard(facts),
        "secrets/.gitignore": "*\n!.gitignore\n",
    }


def _compose(facts: Facts, options: Options) -> dict[str, Any]:
    secrets = {"alert-webhook": "secrets/alert-webhook", "grafana-admin": "secrets/grafana-admin"}
    if options.api_keys:
        secrets["api-keys"] = "secrets/api-keys"
    return {
        "name": facts.label,
        "services": {
            "server": _server(options),
            "prometheus": _prometheus(),
            "alertmanager": _alertmanager(),
            "grafana": _grafana(),
        },
        # The files must be readable for the containers' users.
        "secrets": {name: {"file": f"./{file}"} for name, file in secrets.items()},
        "volumes": {"prometheus": {}, "alertmanager": {}, "grafana": {}},
    }


def _contained(service: dict[str, Any], cpus: str, memory: str, processes: int) -> dict[str, Any]:
    """What every service has: nothing that it does not need."""
    return {
        **service,
        "restart": "unless-stopped",
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "deploy": {"resources": {"limits": {"cpus": cpus, "memory": memory, "pids": processes}}},
        "logging": {"driver": "json-file", "options": {"max-size": "10m", "max-file": "5"}},
    }


def _server(options: Options) -> dict[str, Any]:
    service: dict[str, Any] = {
        "image": options.image,
        "build": {"context": f"./{CONTEXT}"},
        "command": options.arguments(),
        "ports": [f"127.0.0.1:{options.port}:{options.port}"],
        "tmpfs": ["/tmp:size=256m,mode=1777"],
        "stop_grace_period": f"{options.grace}s",
    }
    if options.api_keys:
        service["secrets"] = ["api-keys"]
    memory = options.memory.lower().removesuffix("i")
    contained = _contained(service, str(options.cpu), memory, 512)
    if options.gpus:
        device = {"driver": "nvidia", "count": options.gpus, "capabilities": ["gpu"]}
        contained["deploy"]["resources"]["reservations"] = {"devices": [device]}
    return contained


def _prometheus() -> dict[str, Any]:
    service = {
        "image": PROMETHEUS,
        "command": [
            "--config.file=/etc/prometheus/prometheus.yml",
            "--storage.tsdb.path=/prometheus",
            "--storage.tsdb.retention.time=30d",
        ],
        "volumes": ["./prometheus:/etc/prometheus:ro", "prometheus:/prometheus"],
        "ports": ["127.0.0.1:9090:9090"],
        "depends_on": {"server": {"condition": "service_started"}},
    }
    return _contained(service, "1", "1g", 256)


def _alertmanager() -> dict[str, Any]:
    service = {
        "image": ALERTMANAGER,
        "command": ["--config.file=/etc/alertmanager/alertmanager.yml", "--storage.path=/alertmanager"],
        "volumes": ["./alertmanager:/etc/alertmanager:ro", "alertmanager:/alertmanager"],
        "secrets": ["alert-webhook"],
        "ports": ["127.0.0.1:9093:9093"],
    }
    return _contained(service, "0.5", "256m", 128)


def _grafana() -> dict[str, Any]:
    service = {
        "image": GRAFANA,
        "environment": {
            "GF_SECURITY_ADMIN_PASSWORD__FILE": ADMIN,
            "GF_USERS_ALLOW_SIGN_UP": "false",
            "GF_ANALYTICS_REPORTING_ENABLED": "false",
            "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
            "GF_PLUGINS_PREINSTALL_DISABLED": "true",
        },
        "volumes": [
            "./grafana/provisioning:/etc/grafana/provisioning:ro",
            "./grafana/dashboards:/etc/grafana/dashboards:ro",
            "grafana:/var/lib/grafana",
        ],
        "tmpfs": ["/tmp:size=64m"],
        "secrets": ["grafana-admin"],
        "ports": ["127.0.0.1:3000:3000"],
        "depends_on": {"prometheus": {"condition": "service_started"}},
    }
    return _contained(service, "1", "512m", 256)

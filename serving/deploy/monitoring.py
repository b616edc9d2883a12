"""What watches the server: alert rules, Prometheus' own config, Alertmanager's, Grafana's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from serving.deploy.facts import Facts
from serving.deploy.options import Options

DASHBOARD = Path(__file__).parent / "files" / "dashboard.json"
DATASOURCE = "prometheus"
"""Uid of the data source that the dashboard names."""
SCRAPE_SECONDS = 15
FEW = 100
"""Requests an hour below which a share of failed ones says nothing."""


def dashboard(facts: Facts) -> str:
    """Grafana's dashboard, which shows this model first."""
    content = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    content["title"] = f"Serving: {facts.name}"
    content["uid"] = f"serving-{facts.label}"[:40]
    for variable in content["templating"]["list"]:
        if variable["name"] == "model":
            variable["current"] = {"text": facts.name, "value": facts.name}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def alert_groups(facts: Facts, options: Options) -> list[dict[str, Any]]:
    """The alert rules, in the form that Prometheus and the Prometheus operator share."""
    return [
        {
            "name": f"{facts.label}-requests",
            "rules": [*_errors(facts, options), _latency(facts, options), _refused(facts)],
        },
        {"name": f"{facts.label}-server", "rules": _server(facts)},
    ]


def _rule(name: str, expression: str, hold: str, severity: str, summary: str, description: str) -> dict[str, Any]:
    return {
        "alert": name,
        "expr": expression,
        "for": hold,
        "labels": {"severity": severity},
        "annotations": {"summary": summary, "description": description},
    }


def _errors(facts: Facts, options: Options) -> list[dict[str, Any]]:
    """Two windows each: the long one says that it matters, the short one that it still goes on."""
    mine = f'model="{facts.name}"'
    rules = []
    for name, factor, long, short, hold, severity in (
        ("ServingErrorsFast", 14.4, "1h", "5m", "2m", "critical"),
        ("ServingErrorsSlow", 6, "6h", "30m", "15m", "warning"),
    ):
        most = f"{options.max_errors * factor:.6g}"
        shares = [
            f'sum(rate(serving_requests_total{{{mine},code=~"5.."}}[{window}]))'
            f" / sum(rate(serving_requests_total{{{mine}}}[{window}])) > {most}"
            for window in (long, short)
        ]
        enough = f"sum(increase(serving_requests_total{{{mine}}}[{long}])) > {FEW}"
        rules.append(
            _rule(
                name,
                "\n".join([shares[0], f"and {shares[1]}", f"and {enough}"]),
                hold,
                severity,
                f"{facts.name}: too many requests fail",
                f"{{{{ $value | humanizePercentage }}}} of the requests of the last {long} were answered with 5xx; "
                f"{options.max_errors:.4g} of a month's are allowed, and this is {factor:g} times as fast.",
            )
        )
    return rules


def _latency(facts: Facts, options: Options) -> dict[str, Any]:
    buckets = f'sum by (le) (rate(serving_request_seconds_bucket{{model="{facts.name}"}}[5m]))'
    return _rule(
        "ServingSlow",
        f"histogram_quantile(0.95, {buckets}) > {options.p95_ms / 1000:g}",
        "10m",
        "warning",
        f"{facts.name}: answers are slow",
        f"p95 is {{{{ $value | humanizeDuration }}}}; {options.p95_ms:g} ms is the most.",
    )


def _refused(facts: Facts) -> dict[str, Any]:
    refused = f'sum(rate(serving_requests_total{{model="{facts.name}",code="503"}}[5m]))'
    return _rule(
        "ServingRefuses",
        f"{refused} > 0",
        "5m",
        "warning",
        f"{facts.name}: requests are refused",
        "{{ $value | humanize }} requests a second get 503: the queue is full, or a worker is gone. "
        "Add replicas, or look at serving_queue_length and serving_worker_restarts_total.",
    )


def _server(facts: Facts) -> list[dict[str, Any]]:
    mine = f'model="{facts.name}"'
    return [
        _rule(
            "ServingDown",
            f'absent(up{{job="{facts.label}"}} == 1)',
            "2m",
            "critical",
            f"{facts.name}: no server answers Prometheus",
            "No instance has been scraped for two minutes.",
        ),
        _rule(
            "ServingWorkersMissing",
            f'serving_workers{{{mine},state="up"}} < ignoring (state) serving_workers{{{mine},state="wanted"}}',
            "2m",
            "critical",
            f"{facts.name}: a worker is missing",
            "{{ $labels.instance }} has {{ $value }} workers up, fewer than wanted, and is not ready.",
        ),
        _rule(
            "ServingWorkersRestart",
            f"increase(serving_worker_restarts_total{{{mine}}}[15m]) > 3",
            "0m",
            "warning",
            f"{facts.name}: workers die again and again",
            "{{ $labels.instance }}: {{ $value | humanize }} restarts in 15 minutes; its log has the reasons.",
        ),
        _rule(
            "ServingVersionsDiffer",
            f"count(count by (version) (serving_bundle_info{{{mine}}})) > 1",
            "2h",
            "warning",
            f"{facts.name}: two versions are served",
            "{{ $value }} versions have answered for two hours: a rollout was left half-way.",
        ),
    ]


def prometheus_config(facts: Facts, options: Options, target: str, rules: str, alertmanager: str) -> dict[str, Any]:
    """Of a Prometheus beside the server: what to scrape, which rules, whom to tell."""
    return {
        "global": {"scrape_interval": f"{SCRAPE_SECONDS}s", "evaluation_interval": f"{SCRAPE_SECONDS}s"},
        "rule_files": [rules],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]},
        "scrape_configs": [
            {"job_name": facts.label, "metrics_path": "/metrics", "static_configs": [{"targets": [target]}]},
            {"job_name": "prometheus", "static_configs": [{"targets": ["127.0.0.1:9090"]}]},
        ],
    }


def alertmanager_config(webhook_file: str) -> dict[str, Any]:
    """All alerts go to one webhook, whose address is read from a file."""
    return {
        "route": {
            "receiver": "webhook",
            "group_by": ["alertname", "model"],
            "group_wait": "30s",
            "group_interval": "5m",
            "repeat_interval": "4h",
        },
        "receivers": [
            {"name": "webhook", "webhook_configs": [{"url_file": webhook_file, "send_resolved": True}]},
        ],
        "inhibit_rules": [
            {
                "source_matchers": ['severity = "critical"'],
                "target_matchers": ['severity = "warning"'],
                "equal": ["model"],
            }
        ],
    }


def grafana_datasource(url: str) -> dict[str, Any]:
    """Grafana's provisioned data source."""
    return {
        "apiVersion": 1,
        "datasources": [
            {
                "name": "Prometheus",
                "uid": DATASOURCE,
                "type": "prometheus",
                "access": "proxy",
                "url": url,
                "isDefault": True,
                "jsonData": {"timeInterval": f"{SCRAPE_SECONDS}s"},
            }
        ],
    }


def grafana_provider(folder: str) -> dict[str, Any]:
    """Where Grafana reads dashboards."""
    return {
        "apiVersion": 1,
        "providers": [
            {
                "name": "serving",
                "type": "file",
                "disableDeletion": True,
                "allowUiUpdates": False,
                "options": {"path": folder},
            }
        ],
    }

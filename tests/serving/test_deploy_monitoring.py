"""What watches a server, by the tools that will read it: promtool, amtool, and the dashboard's queries as rules."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploying import FACTS, files_of, of_kind, written
from harness import ROOT

METRICS = {
    "serving_requests_total",
    "serving_request_seconds_bucket",
    "serving_requests_in_flight",
    "serving_batch_size_sum",
    "serving_batch_size_count",
    "serving_queue_seconds_bucket",
    "serving_queue_length",
    "serving_workers",
    "serving_worker_restarts_total",
    "serving_reloads_total",
    "serving_bundle_info",
    "serving_predictions_total",
}
"""What the server tells."""
needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")


def tool(*command: str, cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"


def alerts() -> dict[str, Any]:
    return yaml.safe_load(files_of("compose")["prometheus/alerts.yml"])


def dashboard() -> dict[str, Any]:
    return json.loads(files_of("compose")["grafana/dashboards/serving.json"])


def queries() -> list[str]:
    """The dashboard's, with its variables replaced as Grafana would."""
    board = dashboard()
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    found += [annotation["expr"] for annotation in board["annotations"]["list"]]
    return [query.replace("$__rate_interval", "1m").replace("$model", FACTS.name) for query in found]


@needs_promtool
def test_promtool_takes_the_config_and_the_rules(tmp_path: Path) -> None:
    folder = written("compose", tmp_path) / "prometheus"
    text = (folder / "prometheus.yml").read_text()
    (folder / "here.yml").write_text(text.replace("/etc/prometheus/", f"{folder}/"))
    tool("promtool", "check", "config", "here.yml", cwd=folder)
    tool("promtool", "check", "rules", "alerts.yml", cwd=folder)


def test_amtool_takes_the_config(tmp_path: Path) -> None:
    if not shutil.which("amtool"):
        pytest.skip("amtool is not installed")
    folder = written("compose", tmp_path) / "alertmanager"
    version = subprocess.run(["amtool", "--version"], capture_output=True, text=True, timeout=30).stdout
    text = (folder / "alertmanager.yml").read_text()
    if re.search(r"version 0\.(1\d|2[0-5])\.", version):  # these do not know url_file yet
        text = re.sub(r"url_file: .*", "url: http://127.0.0.1/", text)
    (folder / "here.yml").write_text(text)
    tool("amtool", "check-config", "here.yml", cwd=folder)


@needs_promtool
def test_the_dashboards_queries_are_promql(tmp_path: Path) -> None:
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries())]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert len(rules) > 12
    tool("promtool", "check", "rules", "rules.yml", cwd=tmp_path)


def test_only_metrics_that_there_are_are_asked_for() -> None:
    rules = [rule["expr"] for group in alerts()["groups"] for rule in group["rules"]]
    asked = set(re.findall(r"serving_[a-z_]+", " ".join([*queries(), *rules])))
    assert asked == METRICS


def test_prometheus_operator_and_prometheus_get_the_same_rules() -> None:
    assert of_kind("kubernetes", "PrometheusRule")["spec"]["groups"] == alerts()["groups"]


def test_the_dashboard_names_the_provisioned_data_source_and_stays_on_its_grid() -> None:
    board = dashboard()
    source = yaml.safe_load(files_of("compose")["grafana/provisioning/datasources/prometheus.yaml"])
    assert set(re.findall(r'"uid": "(prometheus)"', json.dumps(board))) == {source["datasources"][0]["uid"]}
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]]
    assert len(set(places)) == len(places) and all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in board["panels"])
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert board["templating"]["list"][0]["current"]["value"] == FACTS.name


M = 'model="digits"'
MINUTES = 90
EVENTS: dict[str, tuple[dict[str, str], str]] = {
    # alert -> series, and when it must be on
    "ServingErrorsFast": (
        {f'serving_requests_total{{{M},code="500"}}': "0+12x", f'serving_requests_total{{{M},code="200"}}': "0+600x"},
        "70m",
    ),
    "ServingSlow": (
        {
            f'serving_request_seconds_bucket{{{M},le="0.5"}}': "0+80x",
            f'serving_request_seconds_bucket{{{M},le="1"}}': "0+100x",
            f'serving_request_seconds_bucket{{{M},le="+Inf"}}': "0+100x",
        },
        "20m",
    ),
    "ServingRefuses": ({f'serving_requests_total{{{M},code="503"}}': "0+6x"}, "12m"),
    "ServingWorkersMissing": (
        {f'serving_workers{{{M},state="up"}}': "1+0x", f'serving_workers{{{M},state="wanted"}}': "2+0x"},
        "5m",
    ),
    "ServingWorkersRestart": ({f"serving_worker_restarts_total{{{M}}}": "0+1x"}, "15m"),
    "ServingDown": ({'up{job="digits"}': "0+0x"}, "5m"),
}
WELL = {
    f'serving_requests_total{{{M},code="500"}}': "0+0x",
    f'serving_requests_total{{{M},code="200"}}': "0+600x",
    f'serving_request_seconds_bucket{{{M},le="0.1"}}': "0+600x",
    f'serving_request_seconds_bucket{{{M},le="0.5"}}': "0+600x",
    f'serving_request_seconds_bucket{{{M},le="+Inf"}}': "0+600x",
    f'serving_workers{{{M},state="up"}}': "2+0x",
    f'serving_workers{{{M},state="wanted"}}': "2+0x",
    f"serving_worker_restarts_total{{{M}}}": "1+0x",
    f'serving_bundle_info{{{M},version="a"}}': "1+0x",
    'up{job="digits"}': "1+0x",
}


def scenario(series: dict[str, str], when: str, on: str) -> dict[str, Any]:
    """A promtool test: these series, and which alerts are on."""
    rules = [rule for group in alerts()["groups"] for rule in group["rules"]]
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": f"{values}{MINUTES}"} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": f'count(ALERTS{{alertname="{rule["alert"]}",alertstate="firing"}})',
                "eval_time": when,
                "exp_samples": [{"value": 1, "labels": "{}"}] if rule["alert"] == on else [],
            }
            for rule in rules
            if on == "" or rule["alert"] == on
        ],
    }


@needs_promtool
def test_alerts_are_on_when_they_must_be_and_off_when_all_is_well(tmp_path: Path) -> None:
    folder = written("compose", tmp_path) / "prometheus"
    tests = [scenario(series, when, alert) for alert, (series, when) in EVENTS.items()]
    tests.append(scenario(WELL, "80m", ""))
    (folder / "test.yml").write_text(yaml.safe_dump({"rule_files": ["alerts.yml"], "tests": tests}))
    tool("promtool", "test", "rules", "test.yml", cwd=folder)


def test_compose_is_as_the_specification_says_and_keeps_each_service_in_its_place() -> None:
    import check_jsonschema
    import jsonschema

    schema = Path(check_jsonschema.__file__).parent / "builtin_schemas" / "vendor" / "compose-spec.json"
    content = yaml.safe_load(files_of("compose")["compose.yaml"])
    jsonschema.Draft7Validator(json.loads(schema.read_text())).validate(content)
    for name, service in content["services"].items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"] and "limits" in service["deploy"]["resources"], (
            name
        )
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert "latest" not in service["image"] and ":" in service["image"], name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            files = files_of("compose")
            assert source in content["volumes"] or any(f"./{path}".startswith(f"{source}/") for path in files), volume
    for name, secret in content["secrets"].items():
        assert secret["file"].startswith("./secrets/"), name
    assert files_of("compose")["secrets/.gitignore"].startswith("*\n")


def test_no_secret_stands_in_any_file() -> None:
    for case in ("compose", "kubernetes", "ci", "sagemaker"):
        for path, text in files_of(case).items():
            assert not re.search(r"(?i)(password|token|api[-_]?key|secret)['\"]?: *['\"]?[A-Za-z0-9+/]{16,}", text), (
                path
            )


def test_the_docs_name_every_target() -> None:
    from serving.deploy.command import TARGETS

    page = (ROOT / "docs" / "deploy.md").read_text()
    assert all(f"`{target}`" in page for target in TARGETS)

"""Rendered objects against Kubernetes' own schemas and those of its extensions, and against each other."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from custom_resources import problems
from deploying import CASES, FACTS, IN_CLUSTERS, files_of, objects_of, of_kind, written

from serving.deploy import pod, scaling
from serving.deploy.command import rendered
from serving.deploy.options import Options

BUILT_IN = ("v1", "apps/v1", "autoscaling/v2", "networking.k8s.io/v1", "policy/v1")
OLDEST, NEWEST = "1.29", "1.37"
PODS = [name for name in IN_CLUSTERS if not name.startswith("kserve")]


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("case", PODS)
def test_built_in_kinds_are_valid(case: str, version: str) -> None:
    built_in = [item for item in objects_of(case) if item["apiVersion"] in BUILT_IN]
    assert len(built_in) >= 7
    for item in built_in:
        kubernetes_validate.validate(item, version, strict=True)


def test_the_validation_is_strict() -> None:
    deployment = of_kind("kubernetes", "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, NEWEST, strict=True)


@pytest.mark.parametrize("case", IN_CLUSTERS)
def test_custom_resources_are_valid(case: str) -> None:
    custom = [item for item in objects_of(case) if item["apiVersion"] not in BUILT_IN]
    assert custom
    for item in custom:
        assert not (found := problems(item)), f"{case}: {item['kind']}: {found}"


def test_the_definitions_are_strict() -> None:
    """An unknown field and a wrong type are found, however deep."""
    rollout = of_kind("argo-rollouts", "Rollout")
    assert problems(rollout) == []
    rollout["spec"]["strategy"]["canary"]["stepz"] = []
    rollout["spec"]["replicas"] = "many"
    assert len(problems(rollout)) == 2


def test_the_job_of_an_analysis_and_a_rollouts_pods_are_valid() -> None:
    """Their definitions leave the pod's template open, so it is looked at as what it becomes."""
    job = of_kind("argo-rollouts", "AnalysisTemplate")["spec"]["metrics"][0]["provider"]["job"]
    kubernetes_validate.validate({"apiVersion": "batch/v1", "kind": "Job", **job}, NEWEST, strict=True)
    template = of_kind("argo-rollouts", "Rollout")["spec"]["template"]
    kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **template}, NEWEST, strict=True)


@pytest.mark.parametrize("case", PODS)
def test_kustomize_puts_it_together(case: str, tmp_path: Path) -> None:
    listed = yaml.safe_load(files_of(case)["kustomization.yaml"])["resources"]
    others = {"kustomization.yaml", "prometheus-adapter-values.yaml"}
    assert set(listed) == set(files_of(case)) - others
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    command = ["kubectl", "kustomize", str(written(case, tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    built = {(item["kind"], item["metadata"]["name"]) for item in yaml.safe_load_all(done.stdout)}
    assert built == {(item["kind"], item["metadata"]["name"]) for item in objects_of(case)}


def template_of(case: str) -> dict[str, Any]:
    (owner,) = [item for item in objects_of(case) if item["kind"] in ("Deployment", "Rollout")]
    return owner["spec"]["template"]


@pytest.mark.parametrize("case", PODS)
def test_names_and_labels_find_each_other(case: str) -> None:
    template = template_of(case)
    labels = template["metadata"]["labels"].items()
    (container,) = template["spec"]["containers"]
    (port,) = container["ports"]
    for item in objects_of(case):
        spec = item.get("spec", {})
        if item["kind"] == "Service":
            assert spec["selector"].items() <= labels
            assert spec["ports"][0]["targetPort"] == port["name"]
        elif item["kind"] in ("PodDisruptionBudget", "Deployment", "Rollout"):
            assert spec["selector"]["matchLabels"].items() <= labels
        elif item["kind"] == "NetworkPolicy":
            assert spec["podSelector"]["matchLabels"].items() <= labels
            assert spec["ingress"][0]["ports"][0]["port"] == port["name"] and spec["egress"] == []
        elif item["kind"] == "ServiceMonitor":
            services = [found["metadata"]["labels"] for found in objects_of(case) if found["kind"] == "Service"]
            assert all(spec["selector"]["matchLabels"].items() <= found.items() for found in services)
            assert spec["endpoints"][0]["port"] == port["name"]
        elif item["kind"] == "HorizontalPodAutoscaler":
            wanted = spec["scaleTargetRef"]
            owner = of_kind(case, wanted["kind"])
            assert (owner["apiVersion"], owner["metadata"]["name"]) == (wanted["apiVersion"], wanted["name"])
            assert "replicas" not in owner["spec"]
        elif item["kind"] in ("Ingress", "HTTPRoute"):
            names = {found["metadata"]["name"] for found in objects_of(case) if found["kind"] == "Service"}
            assert backends(item) and backends(item) <= names


def backends(item: dict[str, Any]) -> set[str]:
    """Names of the services that an Ingress or a route sends to."""
    if item["kind"] == "HTTPRoute":
        return {backend["name"] for rule in item["spec"]["rules"] for backend in rule["backendRefs"]}
    return {path["backend"]["service"]["name"] for rule in item["spec"]["rules"] for path in rule["http"]["paths"]}


@pytest.mark.parametrize("case", PODS)
def test_the_pod_is_restricted_and_complete(case: str) -> None:
    spec = template_of(case)["spec"]
    (container,) = spec["containers"]
    assert (
        spec["securityContext"]["runAsNonRoot"]
        and spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    )
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is False
    settings = of_kind_named(case, "ConfigMap", FACTS.label)["data"]
    assert set(re.findall(r"\$\((\w+)\)", " ".join(container["args"]))) == set(settings)
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["volumes"]}
    drain = int(settings["SERVING_DRAIN_SECONDS"])
    undrained = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] > drain + undrained


def of_kind_named(case: str, kind: str, name: str) -> dict[str, Any]:
    (found,) = [item for item in objects_of(case) if (item["kind"], item["metadata"]["name"]) == (kind, name)]
    return found


def test_new_settings_make_new_pods() -> None:
    def annotation(**chosen: Any) -> str:
        template = pod.template(FACTS, Options(image="x:1", **chosen))
        return template["metadata"]["annotations"]["serving/settings"]

    assert annotation() == annotation(replicas=5) != annotation(max_batch=64)


def test_the_autoscaler_takes_the_measured_number_and_says_when_there_is_none() -> None:
    unmeasured = dataclasses.replace(FACTS, in_flight=None, measured_on="")
    options = Options(image="x:1", max_batch=32, workers=2)
    assert scaling.in_flight_target(FACTS, options) == 24 and "2 CPUs" in scaling.why_target(FACTS, options)
    assert scaling.in_flight_target(unmeasured, options) == 32
    text = rendered("kubernetes", unmeasured, options)["hpa.yaml"]
    assert "NOT measured" in text and "averageValue: '32'" in text


@pytest.mark.parametrize("case", [name for name in PODS if CASES[name][1].get("expose", "none") != "none"])
def test_what_reloads_and_measures_is_not_reached_from_outside(case: str) -> None:
    kind = "HTTPRoute" if CASES[case][1]["expose"] == "gateway" else "Ingress"
    spec = of_kind(case, kind)["spec"]
    if kind == "Ingress":
        paths = [entry["path"] for entry in spec["rules"][0]["http"]["paths"]]
    else:
        paths = [entry["path"]["value"] for entry in spec["rules"][0]["matches"]]
    for private in ("/metrics", "/v2/repository/index", "/v2/repository/models/digits/load"):
        assert not any(private == path or private.startswith(f"{path}/") for path in paths)
    assert any("/v2/models/digits/infer".startswith(f"{path}/") for path in paths)


def test_a_rollout_goes_by_steps_and_its_analysis_tells_the_versions_apart() -> None:
    steps = of_kind("argo-rollouts", "Rollout")["spec"]["strategy"]["canary"]["steps"]
    assert [step["setWeight"] for step in steps if "setWeight" in step] == [10, 50]
    assert "analysis" in steps[1] and "analysis" in steps[3]
    template = of_kind("argo-rollouts", "AnalysisTemplate")
    names = {argument["name"] for argument in template["spec"]["args"]}
    given = {argument["name"] for argument in steps[1]["analysis"]["args"]}
    (container,) = template["spec"]["metrics"][0]["provider"]["job"]["spec"]["template"]["spec"]["containers"]
    assert names == given == set(re.findall(r"\{\{args\.(\w+)\}\}", " ".join(container["command"])))
    monitor = of_kind("argo-rollouts", "ServiceMonitor")["spec"]
    (label,) = monitor["podTargetLabels"]
    assert f"--by={label.replace('-', '_')}" in container["command"]
    pod_labels = template["spec"]["metrics"][0]["provider"]["job"]["spec"]["template"]["metadata"]["labels"]
    assert not pod.selector(FACTS).items() <= pod_labels.items()


@pytest.mark.parametrize("version", ["550059309e51", "123456789012", "0e1234567890", "3f2a9c1b77d0"])
def test_a_version_that_looks_like_a_number_stays_text(version: str, tmp_path: Path) -> None:
    files = rendered("kubernetes", dataclasses.replace(FACTS, version=version), Options(image="x:1", memory="2Gi"))
    assert f"version: {version}" not in files["service.yaml"] or version == "3f2a9c1b77d0"
    if shutil.which("kubectl"):  # reads as the cluster does
        for path, text in files.items():
            (tmp_path / path).write_text(text)
        command = ["kubectl", "kustomize", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        for item in yaml.safe_load_all(done.stdout):
            assert item["metadata"]["labels"]["app.kubernetes.io/version"] == version


def test_kserve_loads_a_bundle_or_has_it_in_the_image() -> None:
    def container(case: str) -> dict[str, Any]:
        (found,) = of_kind(case, "InferenceService")["spec"]["predictor"]["containers"]
        return found

    inside, stored = container("kserve"), container("kserve-storage")
    assert inside["args"][0] == "/bundle" and stored["args"][0] == "/mnt/models"
    assert {"name": "STORAGE_URI", "value": "s3://models/digits"} in stored["env"]
    assert inside["env"] == [{"name": "PROTOCOL", "value": "v2"}]

"""Pipelines and clouds: against the schemas of their makers, where those are here."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploying import FACTS, IMAGE, files_of, written
from harness import ROOT

from serving.deploy.command import CONTEXTS, rendered
from serving.deploy.options import Options

WORKFLOW = ".github/workflows/serve-digits.yml"


def workflow() -> dict[str, Any]:
    return yaml.safe_load(files_of("ci")[WORKFLOW])


@pytest.mark.parametrize(("schema", "file"), [("github-workflows", WORKFLOW), ("gitlab-ci", ".gitlab-ci.yml")])
def test_pipelines_are_valid(schema: str, file: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
    command.append(str(written("ci", tmp_path) / file))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_workflow_has_few_permissions_and_actions_that_can_not_be_moved() -> None:
    content = workflow()
    assert content["permissions"] == {}
    assert content["jobs"]["image"]["permissions"] == {"contents": "read", "packages": "write"}
    assert content["jobs"]["canary"]["permissions"] == {"contents": "read"}
    used = [step["uses"] for job in content["jobs"].values() for step in job["steps"] if "uses" in step]
    assert len(used) == 5 and all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action) for action in used)
    assert content["jobs"]["canary"]["environment"] == "production"
    assert all("timeout-minutes" in job for job in content["jobs"].values())


def test_nothing_is_pushed_before_it_has_answered_and_was_scanned() -> None:
    steps = [json.dumps(step) for step in workflow()["jobs"]["image"]["steps"]]
    script = yaml.safe_load(files_of("ci")[".gitlab-ci.yml"])["build"]["script"]
    for lines in (steps, script):
        places = [
            next(i for i, line in enumerate(lines) if word in line)
            for word in ("deploy.check /bundle", "scan.sh", "docker push")
        ]
        assert places == sorted(places)


def test_expressions_reach_scripts_only_through_the_environment() -> None:
    for job in workflow()["jobs"].values():
        assert not any("${{" in step.get("run", "") for step in job["steps"])


def test_another_registry_has_its_own_password() -> None:
    files = rendered("ci", FACTS, Options(image="registry.example.com:5000/digits:1"))
    content = yaml.safe_load(files[WORKFLOW])
    (login,) = [step["with"] for step in content["jobs"]["image"]["steps"] if "login-action" in step.get("uses", "")]
    assert login["registry"] == "registry.example.com:5000" and "secrets.REGISTRY_PASSWORD" in login["password"]
    assert content["jobs"]["image"]["permissions"] == {"contents": "read"}
    assert "registry.example.com:5000/digits:VERSION" in files[WORKFLOW]


KUBECTL = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$1 $2" in
    "rollout status") exit "$STATUS" ;;
    "get rollout") tail -n +"$(wc -l < "$CALLS")" "$ANSWERS" | head -n 1 ;;
esac
"""
"""In place of a cluster, which is not to be had: notes the calls, and answers from a file."""


def deploy(tmp_path: Path, folder: str, status: int = 0, answers: str = "") -> tuple[int, str, str]:
    """Exit code of ci/deploy.sh, its calls of kubectl, and what it said."""
    script = written("ci", tmp_path / "ci") / "ci" / "deploy.sh"
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "kubectl").write_text(KUBECTL)
    (programs / "kubectl").chmod(0o755)
    (programs / "sleep").write_text("#!/bin/sh\n")
    (programs / "sleep").chmod(0o755)
    (tmp_path / "answers").write_text("(of apply)\n" + answers)
    environment = {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "ANSWERS": str(tmp_path / "answers"),
        "STATUS": str(status),
        "DEPLOY_SECONDS": "60",
    }
    manifests = written(folder, tmp_path / "manifests")
    command = ["sh", str(script), str(manifests), "digits", "production"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, (tmp_path / "calls").read_text(), done.stdout + done.stderr


def test_a_deployment_that_does_not_get_ready_is_undone(tmp_path: Path) -> None:
    code, calls, said = deploy(tmp_path, "kubernetes", status=1)
    assert code == 1 and "undone" in said
    assert "rollout undo --namespace production deployment/digits" in calls


def test_a_deployment_that_gets_ready_stays(tmp_path: Path) -> None:
    code, calls, _ = deploy(tmp_path, "kubernetes")
    assert (
        code == 0 and "undo" not in calls and calls.startswith("apply --server-side --namespace production --kustomize")
    )


@pytest.mark.parametrize(("end", "code"), [("Healthy", 0), ("Degraded RolloutAborted: metric no-worse failed", 1)])
def test_a_rollout_is_watched_to_its_end(end: str, code: int, tmp_path: Path) -> None:
    """The phase of the version before, which the controller shows until it has seen the new one, does not count."""
    answers = f"7 6 Healthy \n7 7 Progressing more replicas\n7 7 Paused CanaryPauseStep\n7 7 {end}\n"
    found, calls, _ = deploy(tmp_path, "argo-rollouts", answers=answers)
    assert (found, calls.count("get rollout digits --namespace production")) == (code, 4)


def test_a_scan_is_a_command_and_says_when_there_is_none(tmp_path: Path) -> None:
    script = str(written("ci", tmp_path) / "ci" / "scan.sh")

    def scan(**given: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": os.environ["PATH"], **given}
        return subprocess.run(["sh", script, IMAGE], env=environment, capture_output=True, text=True, timeout=60)

    assert scan().returncode == 0 and f"{IMAGE} was NOT scanned" in scan().stderr
    assert scan(SCANNER="echo looks at").stdout == f"looks at {IMAGE}\n"
    assert scan(SCANNER="false").returncode == 1


def test_shellcheck_finds_nothing(tmp_path: Path) -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    scripts = sorted(str(file) for file in written("ci", tmp_path).rglob("*.sh"))
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, timeout=60)
    assert (len(scripts), done.returncode) == (2, 0), done.stdout


@pytest.mark.parametrize("target", [target for target, folder in CONTEXTS.items() if folder])
def test_targets_that_need_an_image_bring_its_context(target: str) -> None:
    assert {"image/Dockerfile", "image/requirements.txt", "image/.dockerignore"} <= set(files_of(target))


def test_the_stack_is_valid(tmp_path: Path) -> None:
    pytest.importorskip("cfnlint", reason="cfn-lint is not installed")
    code = "import sys; from cfnlint.runner import main; sys.argv = ['cfn-lint', sys.argv[1]]; main()"
    command = [sys.executable, "-c", code, str(written("sagemaker", tmp_path) / "stack.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_stacks_references_are_there() -> None:
    stack = yaml.safe_load(files_of("sagemaker")["stack.yaml"])
    text = json.dumps(stack)
    known = set(stack["Resources"]) | set(stack["Parameters"])
    assert set(re.findall(r'"Ref": "(\w+)"', text)) | set(re.findall(r'"Fn::GetAtt": \["(\w+)"', text)) <= known
    alarms = stack["Resources"]["Endpoint"]["Properties"]["DeploymentConfig"]["AutoRollbackConfiguration"]["Alarms"]
    assert [alarm["AlarmName"]["Ref"] for alarm in alarms] == ["Errors", "Slow"]


def test_vertex_bodies_are_requests_of_its_interface() -> None:
    types = pytest.importorskip("google.cloud.aiplatform_v1.types", reason="google-cloud-aiplatform is not installed")
    from google.protobuf import json_format

    for name, kind in (
        ("model", types.UploadModelRequest),
        ("endpoint", types.Endpoint),
        ("deploy", types.DeployModelRequest),
    ):
        json_format.ParseDict(json.loads(files_of("vertex")[f"{name}.json"]), kind.pb(kind()))


def test_vertex_asks_at_the_servers_own_routes_and_port() -> None:
    container = json.loads(files_of("vertex")["model.json"])["model"]["containerSpec"]
    port = container["ports"][0]["containerPort"]
    assert container["args"][container["args"].index("--port") + 1] == str(port)
    assert (container["predictRoute"], container["healthRoute"]) == ("/predict", "/ready")


def test_azure_takes_the_endpoint_and_the_deployment(tmp_path: Path) -> None:
    pytest.importorskip("azure.ai.ml", reason="azure-ai-ml is not installed")
    code = (
        "import sys\nfrom azure.ai.ml import load_online_deployment, load_online_endpoint\n"
        "found = load_online_deployment(sys.argv[1] + '/deployment.yml')\n"
        "assert found.endpoint_name == load_online_endpoint(sys.argv[1] + '/endpoint.yml').name\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(written("azureml", tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_azure_asks_at_the_port_of_the_image() -> None:
    deployment = yaml.safe_load(files_of("azureml")["deployment.yml"])
    routes = deployment["environment"]["inference_config"].values()
    (exposed,) = re.findall(r"^EXPOSE (\d+)$", files_of("azureml")["image/Dockerfile"], re.M)
    assert {route["port"] for route in routes} == {int(exposed)}
    assert {route["path"] for route in routes} == {"/health", "/ready", "/predict"}


def test_rendering_knows_nothing_of_the_trainer() -> None:
    for file in (ROOT / "serving" / "deploy").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (trainer|recipes)\b", file.read_text(), re.M), file

"""Pipelines: is the bundle whole, does its image answer as in training, is it safe, and out by a canary."""

from __future__ import annotations

from typing import Any

from serving.deploy.facts import Facts
from serving.deploy.options import Options
from serving.deploy.targets import docker
from serving.deploy.yaml_text import yaml_text
from serving.errors import Mistake

FOLDER = "deploy/docker"
"""The rendered build context in the repository."""
MANIFESTS = "deploy/argo-rollouts"
ACTIONS = {
    "checkout": "actions/checkout@3d3c42e5aac5ba805825da76410c181273ba90b1",  # v7.0.1
    "buildx": "docker/setup-buildx-action@37fe631027851001ddb9b187196cc803df7f5f0e",  # v4.3.0
    "login": "docker/login-action@4907a6ddec9925e35a0a9e82d7399ccc52663121",  # v4.1.0
    "build": "docker/build-push-action@53b7df96c91f9c12dcc8a07bcb9ccacbed38856a",  # v7.3.0
}
"""By commit: a tag can be moved."""
VERSIONS = "checkout v7.0.1, setup-buildx-action v4.3.0, login-action v4.1.0, build-push-action v7.3.0"
GITHUB = "ghcr.io"
"""The registry that a workflow's own token opens."""
DOCKER, KUBECTL = "docker:28.3", "alpine/k8s:1.33.3"
"""Images of GitLab's jobs."""
CHECK = "python -m serving.deploy.check"


def render(facts: Facts, options: Options) -> dict[str, str]:
    """A workflow for GitHub, a pipeline for GitLab, and the two scripts that both call."""
    steps = (
        "1. the bundle's hashes, without any package  2. build  3. the golden requests, answered by the very image\n"
        "4. scan (ci/scan.sh: put your scanner there)  5. push  6. canary (ci/deploy.sh), after somebody's approval\n\n"
        f"Expects what `trainer deploy render` wrote for docker in {FOLDER} and for argo-rollouts (or kubernetes) in\n"
        f"{MANIFESTS}, with --image {_repository(options)}:VERSION; large bundles by Git LFS.\n"
    )
    github = (
        f"Serves {facts.name}. To be copied to the top of the repository, with the folder ci/.\n\n{steps}\n"
        "Set: environment `production` with reviewers and the secret KUBECONFIG; variables NAMESPACE and SCANNER;\n"
        "for a registry that is not GitHub's: variable REGISTRY_USER and secret REGISTRY_PASSWORD.\n"
        f"Actions by commit: {VERSIONS}."
    )
    gitlab = (
        f"Serves {facts.name}. To be copied to the top of the repository, with the folder ci/.\n\n{steps}\n"
        "Set: variables NAMESPACE and SCANNER, and KUBECONFIG of type file, protected, for the environment production."
    )
    return {
        f".github/workflows/serve-{facts.label}.yml": yaml_text(github, _github(facts, options)),
        ".gitlab-ci.yml": yaml_text(gitlab, _gitlab(facts, options)),
        "ci/scan.sh": (docker.FILES / "scan.sh").read_text(encoding="utf-8"),
        "ci/deploy.sh": (docker.FILES / "deploy.sh").read_text(encoding="utf-8"),
    }


def _repository(options: Options) -> str:
    """The image's name without its tag."""
    return options.image.rpartition(":")[0]


def _registry(options: Options) -> str:
    """Where the image is pushed to. Raises Mistake where its name says none, or no tag."""
    host, slash, rest = options.image.partition("/")
    if not slash or not ("." in host or ":" in host or host == "localhost") or ":" not in rest:
        raise Mistake(
            f"--image {options.image}: a pipeline pushes the image: name it REGISTRY/NAME:TAG, e.g. ghcr.io/you/model:1"
        )
    return host


def _replay(image: str) -> str:
    return (
        "docker run --rm --network none --read-only --tmpfs /tmp \\\n"
        "  --cap-drop ALL --security-opt no-new-privileges \\\n"
        f'  --entrypoint python "{image}" -m serving.deploy.check /bundle\n'
    )


def _github(facts: Facts, options: Options) -> dict[str, Any]:
    return {
        "name": f"serve {facts.name}",
        "on": {"push": {"branches": ["main"], "paths": [f"{FOLDER}/**", f"{MANIFESTS}/**"]}, "workflow_dispatch": {}},
        "permissions": {},
        # One at a time, and never cut off: a rollout that lost its watcher would be nobody's.
        "concurrency": {"group": f"serve-{facts.label}", "cancel-in-progress": False},
        "env": {"IMAGE": options.image},
        "jobs": {"image": _github_image(options), "canary": _github_canary(facts)},
    }


def _github_image(options: Options) -> dict[str, Any]:
    registry = _registry(options)
    user, password = "vars.REGISTRY_USER", "secrets.REGISTRY_PASSWORD"
    permissions = {"contents": "read"}
    if registry == GITHUB:
        user, password, permissions = "github.actor", "secrets.GITHUB_TOKEN", {"contents": "read", "packages": "write"}
    return {
        "runs-on": "ubuntu-24.04",
        "timeout-minutes": 60,
        "permissions": permissions,
        "steps": [
            {"uses": ACTIONS["checkout"], "with": {"lfs": True, "persist-credentials": False}},
            {"name": "The bundle is whole", "working-directory": FOLDER, "run": f"{CHECK} --hashes-only bundle"},
            {"uses": ACTIONS["buildx"]},
            {
                "name": "Build",
                "uses": ACTIONS["build"],
                "with": {
                    "context": FOLDER,
                    "tags": "${{ env.IMAGE }}",
                    "load": True,
                    "cache-from": "type=gha",
                    "cache-to": "type=gha,mode=max",
                },
            },
            {"name": "It answers as in training", "run": _replay("$IMAGE")},
            {"name": "Scan", "env": {"SCANNER": "${{ vars.SCANNER }}"}, "run": 'sh ci/scan.sh "$IMAGE"'},
            {
                "uses": ACTIONS["login"],
                "with": {
                    "registry": registry,
                    "username": f"${{{{ {user} }}}}",
                    "password": f"${{{{ {password} }}}}",
                },
            },
            {"name": "Push", "run": 'docker push "$IMAGE"'},
        ],
    }


def _github_canary(facts: Facts) -> dict[str, Any]:
    return {
        "needs": "image",
        "runs-on": "ubuntu-24.04",
        "timeout-minutes": 180,
        "permissions": {"contents": "read"},
        "environment": "production",
        "steps": [
            {"uses": ACTIONS["checkout"], "with": {"persist-credentials": False}},
            {
                "name": "Canary",
                "env": {
                    "KUBECONFIG_CONTENT": "${{ secrets.KUBECONFIG }}",
                    "NAMESPACE": "${{ vars.NAMESPACE }}",
                },
                "run": (
                    "umask 077\n"
                    'printf "%s" "$KUBECONFIG_CONTENT" > "$RUNNER_TEMP/kubeconfig"\n'
                    f'KUBECONFIG="$RUNNER_TEMP/kubeconfig" sh ci/deploy.sh {MANIFESTS} {facts.label} "$NAMESPACE"\n'
                ),
            },
            {"name": "Forget the key", "if": "always()", "run": 'rm -f "$RUNNER_TEMP/kubeconfig"'},
        ],
    }


def _gitlab(facts: Facts, options: Options) -> dict[str, Any]:
    rules = [
        {"if": "$CI_COMMIT_BRANCH == $CI_DEFAULT_BRANCH", "changes": [f"{FOLDER}/**/*", f"{MANIFESTS}/**/*"]},
    ]
    return {
        "stages": ["verify", "build", "canary"],
        "variables": {"IMAGE": options.image, "DOCKER_TLS_CERTDIR": "/certs"},
        "workflow": {"rules": [{"if": "$CI_COMMIT_BRANCH == $CI_DEFAULT_BRANCH"}]},
        "bundle": {
            "stage": "verify",
            "image": docker.base(facts),
            "rules": rules,
            "script": [f"cd {FOLDER}", f"{CHECK} --hashes-only bundle"],
        },
        "build": {
            "stage": "build",
            "image": DOCKER,
            "services": [f"{DOCKER}-dind"],
            "rules": rules,
            "timeout": "1h",
            "before_script": [
                'printf "%s" "$CI_REGISTRY_PASSWORD" | '
                'docker login --username "$CI_REGISTRY_USER" --password-stdin "$CI_REGISTRY"'
            ],
            "script": [
                f'docker build --tag "$IMAGE" {FOLDER}',
                _replay("$IMAGE"),
                'sh ci/scan.sh "$IMAGE"',
                'docker push "$IMAGE"',
            ],
        },
        "canary": {
            "stage": "canary",
            "image": {"name": KUBECTL, "entrypoint": [""]},
            "rules": [{**rules[0], "when": "manual"}],
            "environment": {"name": "production"},
            "resource_group": f"serve-{facts.label}",
            "timeout": "3h",
            "script": [f'sh ci/deploy.sh {MANIFESTS} {facts.label} "$NAMESPACE"'],
        },
    }

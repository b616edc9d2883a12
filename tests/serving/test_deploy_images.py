"""A rendered build context is all that a server needs: no `trainer`, no package that is not pinned."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import language_bundles
import pytest
from deploying import FACTS, IMAGE, doubling_bundle, files_of, written
from harness import ROOT
from packaging.utils import canonicalize_name
from processes import wait_until

from serving.bundle import Bundle
from serving.deploy import facts, pins, writing
from serving.deploy.command import rendered
from serving.deploy.options import Options
from serving.deploy.targets import sagemaker
from trainer.local_ranks import free_port

ONLY_PINNED = """
import sys
HIDDEN = set({hidden})
class Image:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Image(finder) for finder in sys.meta_path]
"""
"""A `sitecustomize` that hides every package that the image would not have."""


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build context of a real bundle, with a `sitecustomize` beside it that keeps to its requirements."""
    folder = tmp_path_factory.mktemp("context")
    return made(doubling_bundle(folder / "from"), folder)


def made(bundle: Bundle, folder: Path) -> Path:
    found = facts.read(bundle)
    files = rendered("docker", found, Options(image=IMAGE))
    writing.write(files, folder / "image", force=False)
    writing.add_context(folder / "image", bundle)
    pinned = {line.partition("==")[0] for line in found.requirements}
    names = importlib.metadata.packages_distributions()
    hidden = [name for name, bringing in names.items() if not pinned & {str(canonicalize_name(n)) for n in bringing}]
    (folder / "site").mkdir()
    text = ONLY_PINNED.replace("{hidden}", repr(sorted({*hidden, "trainer", "recipes"} - {"serving"})))
    (folder / "site" / "sitecustomize.py").write_text(text)
    return folder


def in_image(context: Path, *arguments: str) -> dict[str, Any]:
    """What starts a program as the image would: its own copy of the server, only pinned packages, an empty home."""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": f"{context / 'site'}{os.pathsep}{context / 'image'}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONSAFEPATH": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HOME": "/tmp",
    }
    # In another folder, and the editable install of this repository comes after the copy.
    return {"args": [sys.executable, "-m", *arguments], "cwd": context, "env": environment}


def run(context: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(**in_image(context, *arguments), capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("case", "file"), [("docker", "Dockerfile"), ("sagemaker", "image/Dockerfile")])
def test_hadolint_finds_nothing(case: str, file: str, tmp_path: Path) -> None:
    program = shutil.which("hadolint") or str(Path(sys.executable).parent / "hadolint")
    path = written(case, tmp_path) / file
    done = subprocess.run([program, str(path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_the_image_is_pinned_not_root_and_stopped_by_sigterm() -> None:
    text = files_of("docker")["Dockerfile"]
    assert re.search(r"^ARG BASE=python:3\.11\.\d+-slim-bookworm$", text, re.M)
    assert re.search(r"^USER \d{4,}:\d{4,}$", text, re.M) and "STOPSIGNAL SIGTERM" in text
    assert re.search(r"^ENTRYPOINT \[", text, re.M) and not re.search(r"^(CMD|ENTRYPOINT) [^\[]", text, re.M)
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.!]+", line) for line in FACTS.requirements)
    assert not re.search(r"@[a-z_]+@", text)


def test_the_copy_is_the_whole_server_and_the_whole_bundle(context: Path) -> None:
    image = context / "image"
    bundle = Bundle.read(image / "bundle")
    bundle.verify()
    ours = {file.relative_to(ROOT).as_posix() for file in (ROOT / "serving").rglob("*") if file.is_file()}
    theirs = {file.relative_to(image).as_posix() for file in (image / "serving").rglob("*") if file.is_file()}
    assert theirs == {name for name in ours if not name.endswith(".pyc")}
    for path in [image / "bundle", *(image / "serving").rglob("*"), *(image / "bundle").rglob("*")]:
        assert path.stat().st_mode & 0o005 == (0o005 if path.is_dir() else 0o004), path


def test_pins_are_what_is_installed_and_no_more_than_serving_needs(context: Path) -> None:
    found = facts.read(Bundle.read(context / "image" / "bundle"))
    names = {line.partition("==")[0]: line.partition("==")[2] for line in found.requirements}
    assert {"torch", "numpy"} <= set(names)
    assert not {
        "lightning",
        "mlflow",
        "ray",
        "optuna",
        "transformers",
        "albumentations",
        "opencv-python-headless",
    } & set(names)
    assert not any(pins.ACCELERATOR.match(name) for name in names)
    for name, version in names.items():
        assert importlib.metadata.version(name).partition("+")[0] == version
    picture = {"kind": "picture", "transform": None}
    plain = pins.requirements("pt2", picture, {"kind": "classification"})
    augmented = pins.requirements("pt2", {**picture, "transform": {"x": 1}}, {"kind": "classification"})
    assert any(line.startswith("opencv") for line in plain)
    assert {line.partition("==")[0] for line in augmented} > {line.partition("==")[0] for line in plain}
    assert any(line.startswith("albumentations==") for line in augmented)


def test_the_context_answers_its_golden_requests_without_trainer_or_unpinned_packages(context: Path) -> None:
    done = run(context, "serving.deploy.check", "image/bundle")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["ok"] and told["golden"] == 4 and told["deviation"] == 0.0
    hidden = run(context, "trainer", "--version")
    assert hidden.returncode != 0 and "No module named trainer" in hidden.stderr


def test_a_language_models_context_answers_its_golden_prompts(tmp_path: Path) -> None:
    context = made(language_bundles.write(tmp_path / "from", adapters=["polite"]), tmp_path)
    pinned = (context / "image" / "requirements.txt").read_text()
    assert "\ntransformers==" in pinned and "\npeft==" in pinned and "\nlightning" not in pinned
    done = run(context, "serving.deploy.check", "image/bundle")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["ok"] and told["golden"] == 5


def test_hashes_are_checked_without_any_package(context: Path) -> None:
    command = in_image(context, "serving.deploy.check", "--hashes-only", "image/bundle")
    command["args"][1:1] = ["-S"]  # no site-packages at all
    done = subprocess.run(**command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, json.loads(done.stdout)["ok"]) == (0, True), done.stderr


def test_a_changed_byte_is_found(context: Path, tmp_path: Path) -> None:
    shutil.copytree(context / "image" / "bundle", tmp_path / "bundle")
    program = tmp_path / "bundle" / "program.pt2"
    content = bytearray(program.read_bytes())
    content[len(content) // 2] ^= 1
    program.write_bytes(content)
    done = run(context, "serving.deploy.check", str(tmp_path / "bundle"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "program.pt2" in done.stderr


def test_the_context_serves(context: Path) -> None:
    """The command of the image itself, but for its port and its address; with SageMaker's paths."""
    text = (context / "image" / "Dockerfile").read_text()
    arguments = json.loads(re.search(r"^CMD (\[.*\])$", text, re.M)[1])  # type: ignore[index]
    port = str(free_port())
    arguments[0] = str(context / "image" / "bundle")
    arguments[arguments.index("--host") + 1] = "127.0.0.1"
    arguments[arguments.index("--port") + 1] = port
    for path, ours in sagemaker.ALIASES.items():
        arguments += ["--alias", f"{path}={ours}"]
    url = f"http://127.0.0.1:{port}"
    log = context / "server.log"
    with log.open("wb") as stream:
        server = subprocess.Popen(**in_image(context, "serving", *arguments), stdout=stream, stderr=stream)
    try:

        def is_ready() -> bool:
            assert server.poll() is None, log.read_text()
            return run(context, "serving.deploy.probe", f"{url}/ping").returncode == 0

        wait_until(is_ready, "the server of the context", deadline=120, pause=0.2)
        body = json.dumps({"instances": [[1, 2, 3]]}).encode()
        for path in ("/predict", "/invocations"):
            request = urllib.request.Request(f"{url}{path}", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=30) as answer:
                assert json.load(answer)["predictions"] == [{"y": [2.0, 4.0, 6.0]}]
        server.terminate()
        assert server.wait(60) == 0, log.read_text()
    finally:
        server.kill()
        server.wait(30)


def test_a_probe_tells_why_not(context: Path) -> None:
    done = run(context, "serving.deploy.probe", f"http://127.0.0.1:{free_port()}/ready")
    assert done.returncode == 1 and "refused" in done.stderr


def test_sagemaker_starts_the_server_by_the_word_serve(tmp_path: Path) -> None:
    """`docker run IMAGE serve`, with a stand-in for the server that shows its arguments."""
    folder = written("sagemaker", tmp_path) / "image"
    (tmp_path / "serving").mkdir()
    (tmp_path / "serving" / "__init__.py").write_text("")
    (tmp_path / "serving" / "__main__.py").write_text("import json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    text = (folder / "Dockerfile").read_text()
    assert text.endswith('CMD ["serve"]\n') and "ENTRYPOINT" not in text and "/ping" in text
    done = subprocess.run(
        [sys.executable, str(folder / "serve")],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "SAGEMAKER_BIND_TO_PORT": "8081", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
    )
    arguments = json.loads(done.stdout)
    assert arguments[0] == "/bundle" and arguments[arguments.index("--port") + 1] == "8081"
    aliases = [arguments[place + 1] for place, word in enumerate(arguments) if word == "--alias"]
    assert aliases == ["/ping=/ready", "/invocations=/predict"]


def test_a_runtime_whose_package_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from serving.errors import Mistake

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else real(name, *rest))
    with pytest.raises(Mistake, match="a pt2 bundle needs torch, which is not installed here"):
        pins.requirements("pt2", {"kind": "tensor"}, {"kind": "tensor"})

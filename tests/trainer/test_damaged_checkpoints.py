"""Checkpoints harmed at random: one line and the last good one, or exactly what was written; never anything else."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import damage
import pytest
import soak
from harness import toy_config
from outcome import losses, only_run, same_bits, state
from processes import ForkServer

from trainer import checkpoint, saving
from trainer.checkpoint import Manifest, NewerFormat
from trainer.cli import main
from trainer.errors import UserError
from trainer.resume import go_back
from trainer.run import Run
from trainer.state import JobState

SECTIONS: dict[str, Any] = {
    "model": {"name": "toy.net", "dropout": 0.2, "width": 16},
    "train": {"max_epochs": 2, "ema_decay": 0.9},
    "checkpoint": {"every_steps": 4, "keep": 9},
}
IN_PROCESS = soak.choose(100, 1000)
BY_COMMAND = soak.choose(4, 60)


@dataclass(frozen=True)
class Original:
    """A run that nothing has happened to."""

    run: Path
    steps: dict[int, tuple[Manifest, JobState, dict[str, bytes]]]
    """By step: manifest, what is loaded, and every file."""


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder; None for what is no file."""
    return dict.fromkeys((str(path.relative_to(folder)) for path in folder.rglob("*")), None) | files(folder)


@pytest.fixture(scope="module", params=["whole", "sharded"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> Original:
    """A run stopped at step 14, in one process, and in two under fsdp."""
    folder = tmp_path_factory.mktemp("original")
    ranks, strategy = (1, "auto") if request.param == "whole" else (2, "fsdp")
    config = toy_config(folder, **SECTIONS, data={"batch_size": 10 // ranks}, strategy={"name": strategy})
    arguments = ["fit", "--config", str(config), "train.max_steps=14"]
    if ranks == 1:  # in this process, with its number of threads: the test goes on with it here
        assert main(arguments) == 0
    else:
        training = server.run(*arguments, cwd=folder, processes=ranks)
        assert training.wait() == [0] * ranks, training.log()
    run, steps = only_run(folder), {}
    for path in checkpoint.present(run / "checkpoints"):
        found = checkpoint.read(path)
        assert found.manifest.sharded == (request.param == "sharded")
        steps[found.manifest.step] = (found.manifest, saving.load(path, found.manifest), files(path))
    assert list(steps) == [4, 8, 12, 14]
    return Original(run, steps)


def same(one: JobState, other: JobState) -> bool:
    for name in saving.GROUPS:
        mine, theirs = getattr(one, name), getattr(other, name)
        if mine.keys() != theirs.keys() or not all(same_bits(mine[key], theirs[key]) for key in mine):
            return False
    return one.numbers == other.numbers


def try_one(original: Original, run: Path, draw: random.Random) -> str:
    """Harm a copy of the run and go on with it; returns what came of it, fails where it should not have."""
    checkpoints = run / "checkpoints"
    harm = damage.at_random(checkpoints, draw)
    untouched = [
        step
        for step, (_, _, whole) in original.steps.items()
        if (folder := checkpoints / checkpoint.folder_name(step)).is_dir() and files(folder).items() >= whole.items()
    ]
    before, said = tree(run), list[str]()
    try:
        found = go_back(Run(run), said.append)
    except UserError as error:
        assert tree(run) == before and "\n" not in str(error), harm
        assert isinstance(error, NewerFormat) or not untouched, harm
        return "refused: a newer format" if isinstance(error, NewerFormat) else "refused: none is whole"
    assert found is not None, harm
    manifest, content, _ = original.steps[found.manifest.step]
    assert found.manifest == manifest and same(saving.load(found.path, found.manifest), content), harm
    assert found.manifest.step >= max(untouched, default=0), f"{harm}: a whole one was passed over"
    assert checkpoint.present(checkpoints)[-1] == found.path and all("\n" not in line for line in said), harm
    assert len([line for line in said if " is damaged (" in line]) == len(said) // 2, said
    for step in untouched:
        if step < found.manifest.step:
            folder = checkpoints / checkpoint.folder_name(step)
            assert files(folder).items() >= original.steps[step][2].items(), harm
    return "the newest is whole" if found.manifest.step == 14 else "an earlier one is taken"


@pytest.mark.soak
def test_no_damage_is_loaded_and_none_gives_a_traceback(
    original: Original, tmp_path: Path, survived: Callable[[str], None]
) -> None:
    seed, outcomes = soak.draw().random(), dict[str, int]()
    for number in range(IN_PROCESS):
        run = Path(shutil.copytree(original.run, tmp_path / "run"))
        try:
            outcome = try_one(original, run, random.Random(f"{seed}-{number}"))
        except BaseException:
            print(f"damage {number} of seed {seed}")
            raise
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        shutil.rmtree(run)
    assert outcomes.keys() >= {"the newest is whole", "an earlier one is taken"}
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    survived(f"{IN_PROCESS} damaged folders of checkpoints: {told}")


@pytest.mark.soak
def test_the_command_line_says_one_line_or_goes_on_to_the_same_bits(
    original: Original, tmp_path: Path, capsys: pytest.CaptureFixture[str], survived: Callable[[str], None]
) -> None:
    seed, codes = soak.draw().random(), list[int]()
    arguments = ["train.max_steps=null", "strategy=auto", "data.batch_size=10"]
    undisturbed = Path(shutil.copytree(original.run, tmp_path / "undisturbed"))
    assert main(["fit", "--resume", str(undisturbed), *arguments]) == 0
    wanted, wanted_numbers = state(undisturbed)
    for number in range(BY_COMMAND):
        run = Path(shutil.copytree(original.run, tmp_path / f"run-{number}"))
        harm = damage.at_random(run / "checkpoints", random.Random(f"{seed}-{number}"))
        capsys.readouterr()
        codes.append(main(["fit", "--resume", str(run), *arguments]))
        told = capsys.readouterr().err
        lines = [line for line in told.splitlines() if line.startswith("trainer: ")]
        assert "Traceback" not in told and (codes[-1], len(lines)) in ((0, 0), (2, 1)), (seed, number, harm, told)
        if codes[-1] == 0:
            tensors, numbers = state(run)
            assert numbers["progress"]["step"] == 20 and numbers == wanted_numbers, (seed, number, harm)
            if not original.steps[14][0].sharded:  # of two processes, one process can't go on with the dropout
                different = [name for name in wanted if not same_bits(tensors[name], wanted[name])]
                assert not different and losses(run) == losses(undisturbed), (seed, number, harm)
    survived(f"{BY_COMMAND} damaged runs by command: {codes.count(0)} went on, {codes.count(2)} refused in one line")

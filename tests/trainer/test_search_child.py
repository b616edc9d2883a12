"""One training of a trial in a forked process: what it tells, how it is judged, and how it goes on."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import environment, toy_config
from outcome import assert_same_bits, entries, record, state
from processes import ForkServer
from trials import Event, Trials

from trainer.branching import branch
from trainer.errors import TrainerError, UserError
from trainer.load import dump, load
from trainer.run import Run
from trainer.search.telling import spent
from trainer.verify.compare_runs import same_bits

OFTEN = ["evaluate.every_steps=5", "model.dropout=0.2", "train.ema_decay=0.9", "checkpoint.keep=9"]


@pytest.fixture
def trials(server: ForkServer, tmp_path: Path) -> Trials:
    return Trials(server, tmp_path, toy_config(tmp_path))


def reports(events: list[Event]) -> list[Event]:
    return [event for event in events if event["event"] == "report"]


def of(event: Event, *keys: str) -> tuple[Any, ...]:
    return tuple(event[key] for key in keys)


def test_a_trial_tells_its_start_its_evaluations_and_its_end(trials: Trials, tmp_path: Path) -> None:
    events = trials.run(*OFTEN, number=7, threads=1)
    (run,) = trials.runs(7)
    assert [event["event"] for event in events] == ["started", *["report"] * 4, "ended"]
    assert of(events[0], "run", "iterations") == (str(run), 4)
    logged = [e for e in entries(run) if "val/loss" in e]
    for number, (said, entry) in enumerate(zip(reports(events), logged, strict=True), 1):
        assert of(said, "iteration", "step", "epoch") == (number, entry["step"], entry["epoch"])
        assert said["metrics"] == {k: v for k, v in entry.items() if k.startswith("val/")}
        assert said["is_last"] == (number == 4)
    seconds = [said["seconds"] for said in reports(events)]
    assert 0 <= seconds[0] <= seconds[-1] < events[-1]["at"] - events[0]["at"]
    end = events[-1]
    assert of(end, "status", "exit_code", "error", "traceback", "run") == ("finished", 0, None, None, str(run))
    assert end["metrics"] == reports(events)[-1]["metrics"], "without the test split: nothing is chosen by it"
    assert min(end["seconds"].values()) > 0 and end["seconds"].keys() == {"setup", "train", "evaluate"}
    config = load(str(run / "config.yaml"))
    assert (config.name, config.train.threads, config.tracking.enabled) == ("t0007", 1, False)
    assert not list((run / "artifacts").rglob("*")), "no pictures"


def test_a_trial_is_one_process_that_can_be_told_apart(trials: Trials) -> None:
    first, second = trials.run(number=1), trials.run(number=2)
    assert first[0]["pid"] != second[0]["pid"] and record(trials.runs(1)[0])["host"]
    assert entries(trials.runs(1)[0]) == entries(trials.runs(2)[0])


@pytest.mark.parametrize("verdict", ["stop", "replace"])
def test_a_stopped_trial_ends_there(trials: Trials, verdict: str) -> None:
    events = trials.run(*OFTEN, verdicts=["continue", verdict])
    assert of(events[-1], "status", "exit_code") == ("stopped", 0) and len(reports(events)) == 2
    assert events[-1]["metrics"] == reports(events)[-1]["metrics"]
    assert record(trials.runs()[0])["status"] == "stopped"


def test_a_paused_trial_goes_on_to_the_same_bits(trials: Trials) -> None:
    trials.run(*OFTEN, number=1)
    first = trials.run(*OFTEN, verdicts=["continue", "pause"])
    assert of(first[-1], "status", "exit_code", "reason") == ("paused", 75, "judged")
    second = trials.run(*OFTEN, reported=2)
    assert [said["iteration"] for said in reports(second)] == [3, 4] and second[-1]["status"] == "finished"
    assert reports(second)[0]["seconds"] > reports(first)[-1]["seconds"] > 0, "over both attempts"
    (run,) = trials.runs()
    assert_same_bits(trials.runs(1)[0], run)


def test_what_nobody_may_have_heard_is_told_again(trials: Trials) -> None:
    first = trials.run(*OFTEN, verdicts=["continue", "pause"])
    second = trials.run(*OFTEN, verdicts=["continue", "pause"])
    assert [said["iteration"] for said in reports(second)] == [1, 2, 3, 4], "a pause that was made is not made again"
    for old, new in zip(reports(first), reports(second)[:2], strict=True):
        assert of(old, "iteration", "step", "metrics", "is_last") == of(new, "iteration", "step", "metrics", "is_last")
    assert second[-1]["status"] == "finished"


def test_a_trial_that_was_to_stop_when_it_was_lost_stops_before_its_first_step(trials: Trials) -> None:
    trials.run(*OFTEN, verdicts=["continue", "pause"])
    events = trials.run(*OFTEN, verdicts=["stop"], reported=1)
    assert [said["iteration"] for said in reports(events)] == [2]
    assert events[-1]["status"] == "stopped" and entries(trials.runs()[0])[-1]["step"] == 10


def test_a_trial_that_had_ended_is_not_trained_again(trials: Trials) -> None:
    first = trials.run(*OFTEN)
    (run,) = trials.runs()
    before = (run / "run.json").read_bytes()
    again = trials.run(*OFTEN)
    assert [event["event"] for event in again] == [event["event"] for event in first]
    for old, new in zip(reports(first), reports(again), strict=True):
        assert of(old, "iteration", "step", "metrics", "is_last") == of(new, "iteration", "step", "metrics", "is_last")
    assert of(again[-1], "status", "metrics", "run") == of(first[-1], "status", "metrics", "run")
    assert (run / "run.json").read_bytes() == before and trials.runs() == [run]
    assert reports(trials.run(*OFTEN, reported=4)) == []
    trials.run(*OFTEN, number=1, verdicts=["stop"])
    stopped = trials.run(*OFTEN, number=1, reported=1)
    assert stopped[-1]["status"] == "stopped" and reports(stopped) == []


def test_a_killed_trial_goes_on_from_its_checkpoint(trials: Trials) -> None:
    trials.run(*OFTEN, number=1)
    trial = trials.start(*OFTEN)
    answers = iter(["save", "continue"])
    while (event := trial.next()) is not None:
        if event["event"] == "report":
            if event["iteration"] == 3:
                trial.training.kill()
                break
            trial.answer(next(answers))
    (run,) = trials.runs()
    assert Run(run).status == "killed"
    events = trials.run(*OFTEN)
    assert [said["iteration"] for said in reports(events)] == [1, 2, 3, 4] and events[-1]["status"] == "finished"
    assert_same_bits(trials.runs(1)[0], run)


def test_a_trial_whose_driver_is_gone_saves_and_ends(trials: Trials) -> None:
    trials.run(*OFTEN, number=1)
    trial = trials.start(*OFTEN)
    assert trial.next() and trial.next()
    trial.hang_up()
    assert trial.training.wait() == [75], trial.training.log()
    (run,) = trials.runs()
    assert record(run)["status"] == "preempted" and (run / "checkpoints" / "step-00000005").is_dir()
    assert [said["iteration"] for said in reports(trials.run(*OFTEN))] == [1, 2, 3, 4], "the first was never heard"
    assert_same_bits(trials.runs(1)[0], run)


def test_a_signal_is_answered_with_a_checkpoint(trials: Trials) -> None:
    trial = trials.start(*OFTEN, "data.delay=0.02")
    assert trial.next()
    trial.training.send(signal.SIGTERM)
    (end,) = trial.judge()[-1:]
    assert of(end, "status", "exit_code", "reason") == ("paused", 75, "interrupted")
    assert trial.training.wait() == [75] and list((trials.runs()[0] / "checkpoints").iterdir())
    assert trials.run(*OFTEN, "data.delay=0.02")[-1]["status"] == "finished"
    trials.run(*OFTEN, "data.delay=0.02", number=1)
    assert_same_bits(trials.runs(1)[0], trials.runs()[0])


@pytest.mark.parametrize(
    ("overrides", "code", "error", "has_trace"),
    [
        (["optimizer.lr=-1"], 2, "command line: optimizer.lr: got -1, wanted a number > 0", False),
        (["data.batch_size=1000"], 2, "data.batch_size: a global batch of 1000", False),
        (["optimizer.lr=1e30", "train.max_epochs=3"], 1, "at step ", False),
        (["data=toy.failing_points", "data.batch_size=10"], 1, "ValueError: no such colour", True),
        (["data=toy.nowhere"], 2, "no module 'toy.nowhere'", False),
    ],
)
def test_what_fails_is_told_in_one_line(
    trials: Trials, overrides: list[str], code: int, error: str, has_trace: bool
) -> None:
    (end,) = trials.run(*overrides)[-1:]
    assert of(end, "status", "exit_code") == ("failed", code)
    assert error in end["error"] and len(end["error"].splitlines()) == 1
    assert (end["traceback"] is not None) == has_trace and (not has_trace or "Traceback" in end["traceback"])


def test_a_trial_begins_with_the_checkpoint_of_another(trials: Trials) -> None:
    trials.run(*OFTEN, number=1, verdicts=["continue", "save"])
    (donor,) = trials.runs(1)
    source = {"run": str(donor), "step": 10}
    trials.run(*OFTEN, "optimizer.lr=0.5", number=2, verdicts=["replace"])
    events = trials.run(*OFTEN, "optimizer.lr=0.001", number=2, source=source, verdicts=["pause"])
    assert [of(said, "iteration", "step") for said in reports(events)] == [(3, 15)]
    events = trials.run(*OFTEN, "optimizer.lr=0.001", number=2, source=source, reported=3)
    assert [of(said, "iteration", "step") for said in reports(events)] == [(4, 20)]
    first, run = trials.runs(2)
    assert record(run)["source"] == {"run": str(donor.resolve()), "step": 10} and "source" not in record(first)
    inherited, own = entries(donor), entries(run)
    number = next(index for index, entry in enumerate(inherited) if entry["step"] > 10)
    assert own[:number] == inherited[:number] and {entry["lr"] for entry in own[number:] if "lr" in entry} == {0.001}
    # The same as a run that was gone on with under another rate: the state is the donor's, the rate the trial's own.
    copy = trials.folder / "trials" / "t0009" / "20260101-000000-0000000"
    shutil.copytree(donor, copy)
    shutil.rmtree(copy / "checkpoints" / "step-00000020")
    changed = load(str(trials.config), [*OFTEN, "optimizer.lr=0.001", f"runs_dir={trials.folder}/trials", "name=t0009"])
    (copy / "config.yaml").write_text(dump(changed))
    training = trials.server.run("fit", "--resume", str(copy), "train.log_every=1", cwd=trials.folder)
    assert training.wait() == [0], training.log()
    ours, theirs = state(run)[0], state(copy)[0]
    assert ours.keys() == theirs.keys() and all(same_bits(ours[key], theirs[key]) for key in ours)


def test_a_branch_shares_files_and_needs_a_checkpoint(trials: Trials, tmp_path: Path) -> None:
    trials.run(*OFTEN, verdicts=["save"])
    donor = Run(trials.runs()[0])
    config = load(str(trials.config), [f"runs_dir={tmp_path}/made"])
    made = branch(donor, 5, config, 1, "data")
    for file in (donor.checkpoints / "step-00000005").iterdir():
        assert file.samefile(made.checkpoints / "step-00000005" / file.name)
    assert made.status == "preempted" and made.last_step() == 5
    with pytest.raises(UserError, match=r"has no checkpoint of step 7 to go on from; there are: 5, 20"):
        branch(donor, 7, config, 1, "data")
    (donor.checkpoints / "step-00000005" / "model.safetensors").write_bytes(b"")
    with pytest.raises(TrainerError, match=r"step-00000005 is damaged .*; there is nothing to go on from"):
        branch(donor, 5, config, 1, "data")


def test_a_fold_is_a_training_of_its_own(trials: Trials) -> None:
    overrides = ["holdout.method=stratified", "holdout.folds=3"]
    ends = [trials.run(*overrides, fold=fold)[-1] for fold in range(3)]
    assert [Path(end["run"]).parent.name for end in ends] == ["t0000-f0", "t0000-f1", "t0000-f2"]
    assert {end["metrics"]["val/count"] for end in ends} == {50.0}
    assert len({record(Path(end["run"]))["lineage"]["data"] for end in ends}) == 3


def test_the_ranks_of_a_trial_hear_one_verdict(trials: Trials) -> None:
    overrides = [*OFTEN, "evaluate.every_steps=2"]
    events = trials.run(*overrides, processes=2, verdicts=["continue", "pause"])
    assert events[0]["iterations"] == 6 and events[-1]["status"] == "paused"
    events = trials.run(*overrides, processes=2, verdicts=["stop"], reported=1)
    assert events[-1]["status"] == "stopped" and [said["iteration"] for said in reports(events)] == [2]
    failing = ["data=toy.failing_points", "data.batch_size=10"]
    (end,) = trials.run(*failing, processes=2, number=1)[-1:]
    assert end["status"] == "failed" and "no such colour" in end["error"]


def test_seconds_are_those_of_every_attempt_up_to_what_it_logged() -> None:
    attempts = [{"started": f"2026-01-01T00:0{minute}:00.000+00:00"} for minute in (0, 2, 4)]
    zero = 1767225600.0
    assert spent(attempts, []) == 0
    assert spent(attempts, [zero - 99]) == 0, "of a run that this one was made from"
    assert spent(attempts, [zero + 5, zero + 10, zero + 130, zero + 247]) == 10 + 10 + 7


@pytest.fixture
def warm_server(tmp_path: Path) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path)
    yield server
    server.close()


def test_a_warm_host_gives_the_bits_of_a_fresh_process(warm_server: ForkServer, tmp_path: Path) -> None:
    config = tmp_path / "base.yaml"
    overrides = [
        *("train.max_steps=12", "train.device=cpu", "tracking.enabled=false", "model=cnn", "train.threads=2"),
        *("train.ema_decay=0.9", "evaluate.every_steps=6", "data.workers=2", "data.batch_size=64", "recipe.mixup=0.2"),
        *("data.augment=[{Affine: {rotate: [-10, 10]}}]", "holdout.method=stratified", "checkpoint.monitor=null"),
    ]
    config.write_text(dump(load("quickstart.yaml", overrides)))
    assert warm_server.ask({"warm": str(config)}) is None
    trials = Trials(warm_server, tmp_path, config)
    for number in (0, 1):
        assert trials.run(number=number)[-1]["status"] == "finished"
    own = ["evaluate.pictures=false", "evaluate.test=false", f"runs_dir={tmp_path}/trials", "name=t0002"]
    command = [sys.executable, "-m", "trainer", "fit", "--config", str(config), *own]
    subprocess.run(command, cwd=tmp_path, env=environment(), check=True, capture_output=True, timeout=240)
    warm, again, fresh = (trials.runs(number)[0] for number in (0, 1, 2))
    assert_same_bits(warm, again)
    assert_same_bits(warm, fresh)
    assert (
        json.loads((warm / "run.json").read_text())["versions"]
        == json.loads((fresh / "run.json").read_text())["versions"]
    )

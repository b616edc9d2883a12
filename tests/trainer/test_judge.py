"""Who watches a training may end, pause or save it after an evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness import toy_config
from outcome import assert_same_bits, entries, only_run, record
from processes import ForkServer

from trainer.cli import main
from trainer.errors import Preempted
from trainer.fit import Result, fit
from trainer.load import load
from trainer.loop import Job
from trainer.resume import find_unfinished
from trainer.run import PREEMPTED, STOPPED, Run
from trainer.verdict import Verdict
from trainer.world import from_environment

CONTINUE = Verdict.CONTINUE
OVERRIDES = ["evaluate.every_steps=5", "train.ema_decay=0.9", "model.dropout=0.2", "checkpoint.keep=9"]


def judged(
    folder: Path, verdicts: list[Verdict], *overrides: str, resume: Path | None = None, **sections: Any
) -> tuple[Result | None, list[tuple[int, dict[str, float]]]]:
    """Train the toy for 20 steps, 5 an evaluation, with these verdicts; what was asked, and the result."""
    asked: list[tuple[int, dict[str, float]]] = []

    def prepare(job: Job) -> None:
        def judge(progress: Any, metrics: dict[str, float]) -> Verdict:
            asked.append((progress.step, metrics))
            return verdicts[len(asked) - 1] if len(asked) <= len(verdicts) else CONTINUE

        job.judge = judge

    folder.mkdir(exist_ok=True)
    config = load(toy_config(folder, **sections), [*OVERRIDES, *overrides])
    run = Run(resume) if resume is not None else None
    return fit(config, run, from_environment(), lambda text: None, prepare=prepare), asked


def steps(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in sorted((run / "checkpoints").iterdir())]


def test_each_evaluation_is_judged_by_the_metrics_that_are_logged(tmp_path: Path) -> None:
    result, asked = judged(tmp_path, [])
    logged = [(e["step"], {k: v for k, v in e.items() if k.startswith("val/")}) for e in entries(only_run(tmp_path))]
    assert asked == [pair for pair in logged if pair[1]] and [step for step, _ in asked] == [5, 10, 15, 20]
    assert result is not None and not result.stopped and record(result.run)["status"] == "finished"


@pytest.mark.parametrize("verdict", [Verdict.STOP, Verdict.REPLACE])
def test_a_stopped_run_ends_at_once_without_saving(verdict: Verdict, tmp_path: Path) -> None:
    result, asked = judged(tmp_path, [CONTINUE, verdict], "checkpoint.every_steps=5")
    assert result is not None and result.stopped and result.steps == 10 and len(asked) == 2
    assert steps(result.run) == [5]
    assert result.metrics == asked[-1][1], "there is no test, and the last evaluation is the one it was judged by"
    now = record(result.run)
    assert (now["status"], now["exit_reason"]) == (STOPPED, None) and now["attempts"][-1]["status"] == STOPPED
    assert not (result.run / "artifacts").exists()


def test_a_stopped_run_is_finished_with_but_may_be_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, _ = judged(tmp_path, [Verdict.STOP], "checkpoint.every_steps=5", "checkpoint.every_epochs=1")
    assert result is not None
    assert find_unfinished(load(toy_config(tmp_path), OVERRIDES)) is None
    assert main(["runs", "list", "--runs-dir", str(tmp_path / "runs"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["status"] == STOPPED
    assert main(["fit", "--resume", str(result.run)]) == 0
    assert record(result.run)["status"] == "finished" and steps(result.run)[-1] == 20


def test_a_verdict_saves_a_checkpoint_with_the_metrics_of_its_evaluation(tmp_path: Path) -> None:
    result, asked = judged(tmp_path, [CONTINUE, Verdict.SAVE])
    assert result is not None and steps(result.run) == [10, 20]
    manifest = json.loads((result.run / "checkpoints" / "step-00000010" / "manifest.json").read_text())
    assert manifest["metrics"] == asked[1][1]


@pytest.mark.parametrize("verdict", [Verdict.STOP, Verdict.REPLACE, Verdict.PAUSE])
def test_after_the_last_step_there_is_nothing_to_end(verdict: Verdict, tmp_path: Path) -> None:
    result, asked = judged(tmp_path, [CONTINUE] * 3 + [verdict])
    assert result is not None and not result.stopped and len(asked) == 4
    assert record(result.run)["status"] == "finished" and steps(result.run) == [20]


def test_a_paused_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole, _ = judged(tmp_path / "whole", [])
    with pytest.raises(Preempted, match="stopped by a pause at step 5 with a checkpoint written"):
        judged(tmp_path / "paused", [Verdict.PAUSE])
    paused = only_run(tmp_path / "paused")
    assert record(paused)["status"] == PREEMPTED and record(paused)["exit_reason"] == "a pause"
    assert steps(paused) == [5]
    with pytest.raises(Preempted):
        judged(tmp_path / "paused", [CONTINUE, Verdict.PAUSE], resume=paused)
    assert steps(paused) == [5, 15]
    judged(tmp_path / "paused", [], resume=paused)
    assert whole is not None
    assert_same_bits(whole.run, paused)


def test_pictures_are_left_out_where_nobody_wants_them(tmp_path: Path) -> None:
    for name in ("true", "false"):
        overrides = [f"runs_dir={tmp_path}/runs", f"name=pictures-{name}", f"evaluate.pictures={name}"]
        overrides += ["evaluate.at_start=true", "train.max_steps=2", "tracking.enabled=false"]
        assert main(["fit", "--config", "quickstart.yaml", *overrides]) == 0
        run = only_run(tmp_path, f"pictures-{name}")
        drawn = sorted(str(path.parent.relative_to(run)) for path in run.rglob("*.png"))
        wanted = [f"artifacts/{where}" for where in ("before/test", "before/val", "test", "val")]
        assert drawn == (wanted if name == "true" else [])
        assert {"val/loss", "test/loss"} <= {key for entry in entries(run) for key in entry}


def test_rank_0_decides_for_all(tmp_path: Path, server: ForkServer) -> None:
    config = toy_config(tmp_path)
    training = server.start(
        str(config), "4", *OVERRIDES, "evaluate.every_steps=2", cwd=tmp_path, processes=2, module="judging"
    )
    assert training.wait() == [0, 0], training.log()
    run = only_run(tmp_path)
    assert record(run)["status"] == STOPPED
    asked = [(tmp_path / f"asked-{rank}").read_text() for rank in (0, 1)]
    assert asked[0] == asked[1] and [json.loads(line)[0] for line in asked[0].splitlines()] == [2, 4]
    assert steps(run) == [2]

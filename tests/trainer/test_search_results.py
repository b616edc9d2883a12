"""What a search leaves on disk and says at its end."""

from __future__ import annotations

import io
import json
import math
import shlex
from pathlib import Path

import pytest
from searches import OBJECTIVE, SPACE, search_config, search_folder, space, trial, trials

from trainer.errors import TrainerError
from trainer.load import diff, load
from trainer.search.closing import show, summary, trial_seconds
from trainer.search.importance import importances
from trainer.search.results import Results, best_config, read_entries, trial_of, write_best
from trainer.search.space import overrides
from trainer.search.trial import FAILED, FINISHED, PRUNED, RUNNING, Report, Trial


def written(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


def test_each_ended_trial_is_one_line_that_gives_the_trial_back(tmp_path: Path) -> None:
    results = Results(tmp_path)
    assert not (tmp_path / "trials.jsonl").exists()
    odd = Report(1, 10, 1.0, {"val/accuracy": math.nan, "val/loss": math.inf}, 2.0)
    given = [
        trial(2),
        trial(0, PRUNED, 2, runs=["trials/t0000/x"], history=[{"params": {"optimizer.lr": 0.1}, "iteration": 1}]),
        trial(1, FAILED, 0, traceback="Traceback\n  line", failures=2, reports=[odd], folds=[{"val/accuracy": 0.5}]),
    ]
    for one in given:
        results.append(one)
    entries = written(tmp_path)
    assert [entry["number"] for entry in entries] == [2, 0, 1]
    assert entries[0]["overrides"] == overrides(given[0].params)
    for one, entry in zip(given, entries, strict=True):
        back = trial_of(entry)
        assert repr(back) == repr(one), "NaN is not equal to itself, but written the same"
    assert "NaN" not in (tmp_path / "trials.jsonl").read_text().replace('"NaN"', "")


def test_a_rebuilt_file_is_exact_and_keeps_the_order_of_ends(tmp_path: Path) -> None:
    results = Results(tmp_path)
    for number in (3, 1):
        results.append(trial(number))
    before = written(tmp_path)
    with (tmp_path / "trials.jsonl").open("a") as file:
        file.write(json.dumps(before[0]) + "\n" + '{"number": 9, "state": "fini')  # twice, and torn by a kill
    missed = trial(2, PRUNED, 2)
    again = Results(tmp_path, [trial(1), missed, trial(3), trial(4, RUNNING, 1)])
    assert [entry["number"] for entry in written(tmp_path)] == [3, 1, 2]
    assert written(tmp_path)[:2] == before, "when they ended is not forgotten"
    again.append(trial(1))
    assert len(written(tmp_path)) == 3
    again.append(trial(4))
    assert [entry["number"] for entry in read_entries(tmp_path)] == [3, 1, 2, 4]


def test_a_search_that_lost_its_trials_leaves_an_empty_file(tmp_path: Path) -> None:
    Results(tmp_path).append(trial(0))
    Results(tmp_path, [])
    assert read_entries(tmp_path) == [] and (tmp_path / "trials.jsonl").read_bytes() == b""
    assert read_entries(tmp_path / "none") == []


def test_a_file_that_takes_no_more_is_told_with_the_verb(tmp_path: Path) -> None:
    results = Results(tmp_path / "gone")
    with pytest.raises(TrainerError, match=r"trials\.jsonl could not be written .*trainer tune --resume"):
        results.append(trial(0))


def test_best_yaml_trains_the_best_trial_again(tmp_path: Path) -> None:
    config = search_config(tmp_path)
    folder = search_folder(config)
    first, second = trial(4), trial(7)
    assert write_best(folder, [], OBJECTIVE) == [] and not (folder / "best.yaml").exists()
    assert write_best(folder, [first], OBJECTIVE) == [folder / "best.yaml"]
    stamp = (folder / "best.yaml").stat()
    write_best(folder, [first, second], OBJECTIVE)
    assert (folder / "best.yaml").stat().st_ino == stamp.st_ino, "written when it changes only"
    write_best(folder, [second, first], OBJECTIVE)
    text = (folder / "best.yaml").read_text()
    loaded = load(folder / "best.yaml")
    assert not diff(
        loaded, load(folder / "base.yaml", [*overrides(second.params), "tune.space={}", "tune.objective={}"])
    )
    assert "\ntune:" not in text and not loaded.tune.space
    comment = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("#")]
    assert second.values is not None
    assert comment[0] == f"Trial 7 of the search {folder}: val/accuracy {second.values[0]:.6g} (max)"
    command = shlex.split(comment[1].removeprefix("The same as: "))
    assert command[:3] == ["trainer", "fit", "--config"]
    assert not diff(load(command[3], command[4:]), load(folder / "base.yaml", overrides(second.params)))


def test_several_objectives_leave_a_file_for_each_point_of_the_front(tmp_path: Path) -> None:
    folder = search_folder(search_config(tmp_path))
    objective = {"val/accuracy": "max", "val/loss": "min"}
    front = [trial(3, values=(0.8, 0.1)), trial(5, values=(0.9, 0.4))]
    names = {path.name for path in write_best(folder, front, objective)}
    assert names == {"best.yaml", "best-3.yaml", "best-5.yaml"}
    assert "Trial 5 of" in (folder / "best.yaml").read_text()
    write_best(folder, [front[0]], objective)
    assert {path.name for path in folder.glob("best*")} == {"best.yaml", "best-3.yaml"}
    assert "val/accuracy 0.8 (max), val/loss 0.1 (min)" in (folder / "best.yaml").read_text()


def test_best_yaml_tells_the_schedule_of_population_based_training(tmp_path: Path) -> None:
    folder = search_folder(search_config(tmp_path))
    params = {"optimizer.name": "sgd", "optimizer.lr": 0.01}
    replaced = trial(1, params=params, history=[{"params": {**params, "optimizer.lr": 0.1}, "iteration": 3}], segment=1)
    text = best_config(folder, replaced, OBJECTIVE)
    assert "#   until evaluation 3: optimizer.name=sgd optimizer.lr=0.1" in text
    assert "#   until" not in best_config(folder, trial(0), OBJECTIVE)


def test_importances_say_what_they_cannot_say() -> None:
    many = trials(40)
    found = importances(many, space(), OBJECTIVE)
    assert next(iter(found.values)) == "optimizer.lr" and sum(found.values.values()) == pytest.approx(1)
    assert found.left_out == {"optimizer.momentum": f"not in all trials ({_with(many, 'optimizer.momentum')} of 20)"}
    assert importances(many[:3], space(), OBJECTIVE).reason == "needs at least 4 finished trials, there are 2"
    same = [trial(number, values=(0.5,)) for number in range(6)]
    assert importances(same, space(), OBJECTIVE).reason == "all finished trials have the same value"
    one = [trial(n, params={"optimizer.lr": 0.01, "train.clip_norm": 0.5 * (1 + n % 3)}) for n in range(6)]
    for number, each in enumerate(one):
        each.values = (0.1 * number,)
    raw = {key: SPACE[key] for key in ("optimizer.lr", "train.clip_norm")}
    assert importances(one, space(raw), OBJECTIVE).left_out == {"optimizer.lr": "the same in all trials"}
    alike = [trial(n, params={"optimizer.lr": 0.01}, values=(0.1 * n,)) for n in range(6)]
    nothing = importances(alike, space({"optimizer.lr": SPACE["optimizer.lr"]}), OBJECTIVE)
    assert not nothing.values and nothing.reason == "no parameter has different values in all finished trials"


def _with(many: list[Trial], key: str) -> int:
    return sum(key in one.params for one in many if one.state == FINISHED)


def test_the_closing_table_and_the_same_as_data(tmp_path: Path) -> None:
    many = [*trials(40), trial(-1, origin="before"), trial(40, RUNNING, 1)]
    many[3].error = "OutOfMemoryError: two\n  lines"
    best = sorted((one for one in many if one.state == FINISHED), key=lambda one: -(one.values or (0,))[0])
    told = summary(tmp_path / "digits" / "tune-x", many, best, space(), OBJECTIVE, mlflow="mlflow ui")
    assert told["counts"] == {"finished": 20, "pruned": 10, "failed": 10, "running": 1} and told["known"] == 1
    assert [item["trial"] for item in told["best"]] == [one.number for one in best[:5]]
    assert told["errors"][0]["error"] == "RuntimeError: it broke" and len(told["errors"][0]["trials"]) == 9
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    stream = io.StringIO()
    show(told, stream)
    lines = stream.getvalue().splitlines()
    first = next(line for line in lines if line.startswith(f"  {best[0].number} "))
    assert f"{(best[0].values or (0,))[0]:.6g}" in first and "step 40" in first and "optimizer.lr=" in first
    assert any("optimizer.momentum is left out" in line for line in lines)
    assert any("1 x OutOfMemoryError: two lines (trial 3)" in line for line in lines)
    assert any("9 x RuntimeError: it broke (trial 7, 11, 15, 19, 23, 27, 31, 35 ...)" in line for line in lines)
    assert any(line.split() == ["MLflow", "mlflow", "ui"] for line in lines)
    assert any("trainer fit --config" in line and "best.yaml" in line for line in lines)


def test_a_search_without_an_end_says_little(tmp_path: Path) -> None:
    told = summary(tmp_path / "tune-x", [], [], space(), OBJECTIVE)
    stream = io.StringIO()
    show(told, stream)
    assert "best trials" not in stream.getvalue() and "importances" not in stream.getvalue()
    assert "0 finished, 0 pruned" in stream.getvalue() and "trial time" not in stream.getvalue()


def test_trial_seconds_add_up() -> None:
    seconds = trial_seconds([trial(0), trial(1, PRUNED, 2)])
    assert seconds == {"train": 12.0, "evaluate": 3.0, "setup": 2.0, "other": 4.0, "slot": 19.0}
    assert trial_seconds([Trial(0, {}, FINISHED, seconds={"train": 3.0})])["other"] == 0.0

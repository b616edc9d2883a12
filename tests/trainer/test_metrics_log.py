"""`metrics.jsonl`: what is logged is read, through crashes, full disks and files that are taken away."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path

import pytest
from disks import fill, small_disk
from harness import toy_config
from processes import wait_until

from trainer.errors import TrainerError
from trainer.load import load
from trainer.run import Run


def make_run(folder: Path) -> Run:
    return Run.create(load(toy_config(folder)), world_size=1, data_fingerprint="")


def test_metrics_that_cannot_be_written_are_one_line_and_leave_no_half_entry(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        run = make_run(disk)
        run.log({"step": 1})
        filler = fill(disk)
        with pytest.raises(TrainerError) as caught:
            for step in range(2, 10_000):
                run.log({"step": step})
        assert str(caught.value) == (
            f"{run.path}/metrics.jsonl could not be written (No space left on device); free space, then: "
            f"trainer fit --resume {run.path}"
        )
        last = run.last_step()
        assert last is not None and last > 1
        filler.unlink()
        run.log({"step": last + 1})
        assert [entry["step"] for entry in run.read_metrics()] == list(range(1, last + 2))
        run.close()


@pytest.mark.parametrize("how", ["removed", "replaced", "folder removed"])
def test_a_log_that_is_gone_is_noticed_within_a_second(how: str, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.log({"step": 1})
    metrics = run.path / "metrics.jsonl"
    if how == "folder removed":
        shutil.rmtree(run.path)
    else:
        metrics.unlink()
    if how == "replaced":
        metrics.write_text("")

    def is_noticed() -> bool:
        try:
            run.log({"step": 2})
        except TrainerError as error:
            assert "metrics.jsonl could not be written (it was removed or replaced in the middle" in str(error)
            return True
        return False

    began = time.monotonic()
    wait_until(is_noticed, "the notice")
    assert time.monotonic() - began < 3


def test_metrics_are_valid_json_with_their_non_finite_numbers(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    entry = {"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1}
    run.log(entry)
    run.log({"step": 2, "a": 1.5})
    lines = (run.path / "metrics.jsonl").read_text().splitlines()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(lines[0], parse_constant=refuse)["b"] == "Infinity"
    first, second = run.read_metrics()
    assert math.isnan(first.pop("a")) and first == {"step": 1, "b": math.inf, "c": -math.inf, "d": 0.1}
    assert second == {"step": 2, "a": 1.5} and run.last_step() == 2
    run.close()


def test_reading_tolerates_a_torn_last_line_only(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert list(run.read_metrics()) == [] and run.last_step() is None
    metrics = run.path / "metrics.jsonl"
    metrics.write_bytes(b'{"step": 1}\n{"step": 2}\n{"ste')
    assert [entry["step"] for entry in run.read_metrics()] == [1, 2] and run.last_step() == 2
    metrics.write_bytes(b'{"step": 1}\n\0\0\0\n{"step": 3}\n')
    with pytest.raises(TrainerError, match=r"metrics\.jsonl:2: damaged line"):
        list(run.read_metrics())
    assert run.rewind(9) == 1
    assert [entry["step"] for entry in run.read_metrics()] == [1, 3]


def test_a_torn_line_does_not_become_part_of_the_next_entry(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run.path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2, "x"')
    run.log({"step": 2})
    assert list(run.read_metrics()) == [{"step": 1}, {"step": 2}]
    run.close()


def test_rewind_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert run.rewind(0) == 0
    for step in range(1, 11):
        run.log({"step": step, "loss": math.nan if step == 3 else 1 / step})
    assert run.rewind(6) == 4
    run.log({"step": 7, "loss": 7.0})
    entries = list(run.read_metrics())
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6, 7]
    assert math.isnan(entries[2]["loss"]) and entries[1]["loss"] == 1 / 2 and entries[6]["loss"] == 7.0
    assert run.rewind(7) == 0
    run.close()


def test_logging_costs_microseconds(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    entry = {"step": 1, "epoch": 0.4, "time": time.time(), "train/loss": 0.1, "lr": 1e-3, "samples_per_second": 1e3}
    run.log(entry)
    rounds = []
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(100):
            run.log(entry)
        rounds.append(time.perf_counter() - start)
    assert min(rounds) / 100 < 100e-6
    run.close()

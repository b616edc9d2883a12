"""The run directory: what is written, by several processes, through crashes."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from disks import fill, small_disk
from harness import environment, toy_config

from trainer.environment import alive, distributions, process_started
from trainer.errors import UserError
from trainer.files import locked, write_atomically
from trainer.lineage import DIFF_LIMIT, config_hash, read_git, without_password
from trainer.load import as_dict, load
from trainer.run import Run, find_runs


def make_run(folder: Path, **sections: Any) -> Run:
    return Run.create(load(toy_config(folder, **sections)), world_size=1, data_fingerprint="fingerprint")


def in_process(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_create_writes_a_directory_that_runs_again(tmp_path: Path) -> None:
    config = load(toy_config(tmp_path))
    run = Run.create(config, world_size=2, data_fingerprint="fingerprint")
    assert run.path.parent == tmp_path / "runs" / "toy"
    assert run.config() == config
    record = run.record
    assert record["status"] == "running" and record["world_size"] == 2 and record["pid"] == os.getpid()
    assert record["versions"]["torch"] == importlib.metadata.version("torch")
    assert record["attempts"][0]["status"] == "running" and record["exit_reason"] is None
    assert all(len(value) == 64 for value in record["lineage"].values())
    assert set(record["lineage"]) == {"config", "code", "data", "id"}
    assert f"torch=={record['versions']['torch']}\n" in (run.path / "environment.txt").read_text()
    assert not list(run.path.glob(".*.json*")), "no temporary file is left behind"


def test_create_needs_no_torch(tmp_path: Path) -> None:
    code = """
import sys
from trainer.load import load
from trainer.run import Run
Run.create(load(sys.argv[1]), 1, "")
heavy = {"torch", "lightning", "mlflow", "rich", "psutil", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    process = in_process(code, str(toy_config(tmp_path)))
    assert process.communicate(timeout=60) and process.returncode == 0


def test_many_runs_that_start_at_once_get_folders_of_their_own(tmp_path: Path) -> None:
    code = """
import sys
from trainer.load import load
from trainer.run import Run
config = load(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for _ in range(10):
    print(Run.create(config, 1, "").path)
"""
    processes = [in_process(code, str(toy_config(tmp_path))) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    paths = [path for process in processes for path in process.communicate("\n", timeout=60)[0].split()]
    assert len(paths) == len(set(paths)) == 20
    assert len(find_runs(tmp_path / "runs")) == 20


def test_passwords_are_cut_out_of_urls() -> None:
    assert (
        without_password("a https://h:80/x, http://u:p@h and mail u@h") == "a https://h:80/x, http://u@h and mail u@h"
    )


def test_an_unwritable_runs_dir_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match=r"runs/toy: no run directory can be made there .*runs_dir"):
        make_run(tmp_path)


def test_open_takes_a_folder_its_config_or_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    for way in (run.path, run.path / "config.yaml", run.id, run.id[:-2]):
        assert Run.open(way).path.samefile(run.path)
    assert Run.open(run.id, tmp_path / "runs").path == run.path


def test_open_says_what_is_wrong(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    make_run(tmp_path)
    runs_dir = tmp_path / "runs"
    with pytest.raises(UserError, match="several runs begin so"):
        Run.open("2", runs_dir)
    with pytest.raises(UserError, match="neither a run directory nor the id of a run"):
        Run.open("x", runs_dir)
    with pytest.raises(UserError, match="the folder of an experiment, not of a run; its newest run is"):
        Run.open(run.path.parent)
    with pytest.raises(UserError, match=r"not a run directory \(no run.json in it\)"):
        Run.open(tmp_path)
    with pytest.raises(UserError, match="no such run directory"):
        Run.open(tmp_path / "a" / "b")
    record = run.record
    write_atomically(run.path / "run.json", json.dumps({**record, "format_version": 99}).encode())
    with pytest.raises(UserError, match="newer version of trainer"):
        Run.open(run.path)
    for damage in ('{"format_version":', "[]", "{}"):
        (run.path / "run.json").write_text(damage)
        with pytest.raises(UserError, match=r"run\.json: .*damaged"):
            Run.open(run.path)


def test_find_runs_is_newest_first_and_shows_damaged_ones(tmp_path: Path) -> None:
    runs = [make_run(tmp_path)]
    for _ in range(2):
        time.sleep(0.002)  # ids count milliseconds
        runs.append(make_run(tmp_path))
    make_run(tmp_path, name="other").end_attempt("finished")
    (runs[1].path / "run.json").unlink()
    found = find_runs(tmp_path / "runs", "toy")
    assert [run.path for run in found] == [run.path for run in reversed(runs)]
    assert [run.status for run in found] == ["running", "damaged", "running"]
    assert len(find_runs(tmp_path / "runs")) == 4
    assert find_runs(tmp_path / "nowhere") == []


def test_updates_of_two_processes_are_all_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    code = """
import sys
from pathlib import Path
from trainer.run import Run
for number in range(30):
    Run(Path(sys.argv[1])).update(**{f"{sys.argv[2]}{number}": number})
"""
    processes = [in_process(code, str(run.path), name) for name in ("a", "b")]
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    record = run.record
    assert all(record[f"{name}{number}"] == number for name in ("a", "b") for number in range(30))


def test_a_killed_process_leaves_a_run_that_is_killed_and_can_go_on(tmp_path: Path) -> None:
    code = """
import sys
from trainer.load import load
from trainer.run import Run
run = Run.create(load(sys.argv[1]), 1, "")
run.log({"step": 1})
print(run.path, flush=True)
sys.stdin.read()
"""
    process = in_process(code, str(toy_config(tmp_path)))
    assert process.stdout is not None
    run = Run.open(process.stdout.readline().strip())
    assert run.status == "running"
    with pytest.raises(UserError, match=f"process {process.pid} on .* is still working on this run, since 20"):
        run.begin_attempt(1)
    process.kill()
    process.communicate()
    assert run.status == "killed" and run.record["status"] == "running"

    run.begin_attempt(2)
    assert run.status == "running" and run.record["pid"] == os.getpid() and run.record["world_size"] == 2
    run.end_attempt("failed", "ValueError: x")
    record = run.record
    assert run.status == "failed" and record["exit_reason"] == "ValueError: x"
    assert [attempt["status"] for attempt in record["attempts"]] == ["killed", "failed"]
    run.begin_attempt(1)
    assert run.record["exit_reason"] is None


def test_the_end_of_a_run_that_cannot_be_recorded_is_a_line_and_no_second_error(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        run = make_run(disk)
        reserve = run.path / ".reserve"
        assert reserve.stat().st_size == reserve.stat().st_blocks * 512 == 65536
        filler = fill(disk)
        assert run.end_attempt("failed", "x" * 4000) is None, "the reserve was given up for it"
        assert run.status == "failed" and len(run.record["exit_reason"]) == 4000 and not reserve.exists()
        fill(disk)
        line = run.end_attempt("failed", "y" * 40_000)
        assert (
            line == f"{run.path}/run.json: that the run ended as failed could not be recorded (No space left on device)"
        )
        assert run.record["exit_reason"] == "x" * 4000 and not list(run.path.glob(".run.json*"))
        filler.unlink()
        run.begin_attempt(1)
        assert reserve.stat().st_size == 65536
        assert run.end_attempt("finished") is None
    gone = make_run(tmp_path)
    shutil.rmtree(gone.path)
    line = gone.end_attempt("failed", "z")
    assert line is not None and "could not be recorded (No such file or directory)" in line


def test_a_run_without_a_reserve_on_a_full_disk_says_what_is_wrong(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        run = make_run(disk)
        run.end_attempt("failed")
        (run.path / ".reserve").unlink()
        fill(disk)
        with pytest.raises(OSError, match="No space left on device"):
            run.begin_attempt(1)
        with pytest.raises(OSError, match="No space left on device"):
            make_run(disk, name="other")
        assert not list(disk.glob("runs/other/*")), "half of a run directory is of no use"


def test_a_process_is_known_by_pid_and_start() -> None:
    started = process_started(os.getpid())
    assert alive(os.getpid(), started) and alive(os.getpid(), None) and alive(1, None)
    assert started is not None and not alive(os.getpid(), started - 1), "another process had this pid before"
    process = in_process("")
    process.communicate()
    assert not alive(process.pid, None) and process_started(process.pid) is None


def test_atomic_writes_replace_whole_files_and_clean_up(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"one")
    write_atomically(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    with pytest.raises(TypeError):
        write_atomically(tmp_path / "a", "text")  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"two"


def test_a_lock_is_held_against_other_processes_and_freed_by_their_death(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from trainer.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
    process = in_process(code, str(tmp_path / "lock"))
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(TimeoutError, match="held by another process"), locked(tmp_path / "lock", timeout=0.1):
        raise AssertionError("both hold it")
    process.kill()
    process.communicate()
    with locked(tmp_path / "lock", timeout=5):
        assert (tmp_path / "lock").exists()


def test_distributions_are_those_that_importlib_finds() -> None:
    known = distributions()
    for name in ("torch", "pydantic", "pyyaml", "mlflow", "ray"):
        assert known[name] == importlib.metadata.version(name)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git work tree with one commit; the current folder."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{name}_NAME", "Ann")
        monkeypatch.setenv(f"{name}_EMAIL", "ann@example.org")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.chdir(folder)
    git(folder, "init", "--quiet", "--initial-branch=main")
    (folder / "model.py").write_text("a = 1\nb = 2\n")
    (folder / ".env").write_text("TOKEN=1\n")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "first")
    return folder


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True).stdout


def test_git_is_recorded_with_a_diff_that_applies(repository: Path, tmp_path: Path) -> None:
    clean = make_run(tmp_path)
    assert clean.record["git"] == {
        "commit": git(repository, "rev-parse", "HEAD").strip(),
        "dirty": False,
        "branch": "main",
    }
    assert not (clean.path / "git.diff").exists()

    (repository / "model.py").write_text("a = 1\nb = 3\n")
    (repository / "new").mkdir()
    (repository / "new" / "recipe.py").write_text("x = 'https://u:hidden@h'\nlast = 'without newline'")
    (repository / "empty.py").write_text("")
    (repository / ".env").write_text("TOKEN=2\n")
    (repository / "my_secrets.py").write_text("TOKEN=3\n")
    dirty = make_run(tmp_path)
    assert dirty.record["git"]["dirty"] is True
    diff = (dirty.path / "git.diff").read_text()
    assert "TOKEN" not in diff and "hidden" not in diff

    clone = tmp_path / "clone"
    git(repository, "clone", "--quiet", ".", str(clone))
    git(clone, "apply", str(dirty.path / "git.diff"))
    assert (clone / "model.py").read_text() == "a = 1\nb = 3\n"
    assert (clone / "new" / "recipe.py").read_text() == "x = 'https://u@h'\nlast = 'without newline'"
    assert (clone / "empty.py").read_text() == ""

    hashes = [run.record["lineage"] for run in (clean, dirty)]
    assert hashes[0]["code"] != hashes[1]["code"] and hashes[0]["id"] != hashes[1]["id"]
    assert hashes[0]["config"] == hashes[1]["config"] and hashes[0]["data"] == hashes[1]["data"]


def test_a_large_diff_is_cut_but_hashed_whole(repository: Path) -> None:
    (repository / "model.py").write_text("x = 1\n" * 300_000)
    first = read_git(repository)
    (repository / "model.py").write_text("x = 1\n" * 300_000 + "y = 1\n")
    second = read_git(repository)
    assert first is not None and second is not None
    assert len(first.diff) < DIFF_LIMIT + 100 and "cut here: the whole diff has" in first.diff
    assert first.diff_hash != second.diff_hash


def test_without_git_our_own_files_are_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    first, second = make_run(tmp_path), make_run(tmp_path)
    assert first.record["git"] is None
    assert first.record["lineage"] == second.record["lineage"]


def test_before_the_first_commit_there_is_no_git_record(repository: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    git(empty, "init", "--quiet")
    assert read_git(empty) is None and read_git(tmp_path) is None
    assert read_git(repository / "model.py") is None


def test_config_hash_is_of_what_is_learnt(tmp_path: Path) -> None:
    def digest(**sections: Any) -> str:
        return config_hash(as_dict(load(toy_config(tmp_path, **sections))))

    plain = digest()
    assert plain == digest(
        runs_dir="elsewhere",
        name="other",
        tracking={"enabled": True},
        checkpoint={"every_steps": 3},
        data={"workers": 2},
        train={"log_every": 7},
    )
    assert (
        plain != digest(seed=1) and plain != digest(data={"batch_size": 5}) and plain != digest(train={"max_epochs": 3})
    )

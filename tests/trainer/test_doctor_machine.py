"""`trainer doctor`: versions, limits and files."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disks import read_only, small_disk
from faults import control_group, only, status
from harness import ROOT, environment
from processes import wait_until

from trainer.doctor import Setting, cgroups
from trainer.doctor import files as doctor_files
from trainer.doctor import limits as doctor_limits
from trainer.doctor import mlflow as doctor_mlflow
from trainer.doctor import versions as doctor_versions
from trainer.load import load
from trainer.world import World


@pytest.mark.parametrize(
    ("wanted", "installed", "found", "remedy"),
    [
        (["torch>=2.14.1"], "2.13.0", "1 of 1 not as required: torch 2.13.0, wanted is >=2.14.1", "'torch>=2.14.1'"),
        (["lightning>=2.6,!=2.6.2,!=2.6.3"], "2.6.3", "lightning 2.6.3, wanted is !=2.6.2,!=2.6.3,>=2.6", "!=2.6.3"),
        (["ray[tune]>=2.60", "numpy"], None, "2 of 2 not as required: ray is missing, numpy is", "'ray[tune]>=2.60' n"),
    ],
)
def test_a_wrong_release_is_a_problem(wanted: list[str], installed: str | None, found: str, remedy: str) -> None:
    check = only(doctor_versions.judge(wanted, lambda name: installed))
    assert check.status == "problem" and found in check.found
    assert check.remedy is not None and check.remedy.startswith("pip install ") and remedy in check.remedy


def test_what_is_not_for_this_system_is_not_required() -> None:
    wanted = ["torch>=2.14.1", "winloop; sys_platform == 'win32'", "timm>=1; extra == 'timm'"]
    check = only(doctor_versions.judge(wanted, {"torch": "2.14.1+cu130"}.get))
    assert (check.status, check.found) == ("ok", "all 1 as required: torch 2.14.1+cu130")


def test_what_is_installed_here_is_as_required(monkeypatch: pytest.MonkeyPatch) -> None:
    assert status(doctor_versions.packages()) == "ok"
    assert status(doctor_versions.python()) == "ok"
    monkeypatch.setattr(platform, "python_version", lambda: "3.10.1")
    assert only(doctor_versions.python()).found.endswith("wanted is <3.15,>=3.11")


def test_without_metadata_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_versions, "DISTRIBUTION", "not-installed")
    assert status(doctor_versions.packages()) == "warning"
    assert status(doctor_versions.python()) == "ok"


def test_an_installation_without_any_dependency_is_told_what_to_install_first(tmp_path: Path) -> None:
    metadata = "Metadata-Version: 2.4\nName: yaml-trainer\nVersion: 1\nRequires-Dist: torch>=2.14.1\n"
    (tmp_path / "yaml_trainer-1.dist-info").mkdir()
    (tmp_path / "yaml_trainer-1.dist-info" / "METADATA").write_text(metadata)
    code = f"import sys; sys.path[:0] = {[str(ROOT), str(tmp_path)]}; from trainer.doctor import versions as v; "
    command = [sys.executable, "-S", "-E", "-c", code + "print(v.packages())"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "status='problem'" in done.stdout and "remedy='pip install packaging'" in done.stdout, done.stderr


def limits_of_a_child(code: str, before: Callable[[], None] | None = None) -> dict[str, Any]:
    """What `doctor_limits` finds in a process that runs `code` first."""
    source = f"""
import json, os, resource
from dataclasses import asdict
from pathlib import Path
from trainer.doctor import limits as doctor_limits
from trainer.doctor import Setting
import psutil
{code}
names = ("cores", "threads", "processes", "open_files", "memory")
print(json.dumps({{name: asdict(getattr(doctor_limits, name)(Setting(Path(".")))[0]) for name in names}}))
"""
    env = {name: value for name, value in environment().items() if not name.startswith("OMP_")}
    done = subprocess.run([sys.executable, "-c", source], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_quota_of_half_a_core_counts_and_not_the_cores_of_the_machine() -> None:
    with control_group(
        "cpu", {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "50000"}, {"cpu.max": "50000 100000"}
    ) as procs:
        found = limits_of_a_child(f"Path({str(procs)!r}).write_text(str(os.getpid()))")
    assert found["cores"]["found"].startswith("0.5 usable of ")
    assert found["cores"]["found"].endswith("(quota of the control group)")
    if (os.cpu_count() or 1) > 1:
        assert found["threads"]["status"] == "warning" and found["threads"]["remedy"] == "set OMP_NUM_THREADS=1"


def test_a_group_with_few_processes_left_is_a_problem() -> None:
    with control_group("pids", {"pids.max": "40"}, {"pids.max": "40"}) as procs:
        found = limits_of_a_child(f"Path({str(procs)!r}).write_text(str(os.getpid()))")["processes"]
    assert found["status"] == "problem" and "of the 40 that the control group grants are used" in found["found"]
    assert "pids.max" in found["remedy"]


def test_a_user_with_few_processes_left_is_a_problem() -> None:
    become = "os.setresuid(65534, 65534, 65534)" if os.geteuid() == 0 else "pass"
    found = limits_of_a_child(f"{become}; resource.setrlimit(resource.RLIMIT_NPROC, (30, 30))")["processes"]
    assert found["status"] == "problem" and "of the 30 of this user are used" in found["found"]
    assert "ulimit -u" in found["remedy"]


def test_few_open_files_are_a_warning_too_few_a_problem() -> None:
    low = limits_of_a_child("resource.setrlimit(resource.RLIMIT_NOFILE, (512, 4096))")["open_files"]
    assert (low["status"], low["remedy"]) == ("warning", "ulimit -n 4096 before the start")
    least = limits_of_a_child("resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))")["open_files"]
    assert least["status"] == "problem" and least["remedy"].startswith("have more allowed (limits.conf")


CGROUP_V1 = {"proc/self/cgroup": "5:memory:/job/task\n3:cpu,cpuacct:/job\n2:pids:/elsewhere/on/the/host\n0::/job\n"}
CGROUP_V2 = {"proc/self/cgroup": "0::/slice/job\n"}


@pytest.mark.parametrize(
    ("files", "cores", "memory", "processes"),
    [
        ({}, None, None, None),
        (
            {
                **CGROUP_V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "150000",
                "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096),
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "8000",
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "7000",
                "sys/fs/cgroup/memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 4000",
                "sys/fs/cgroup/memory/job/task/memory.limit_in_bytes": "9000",
                "sys/fs/cgroup/memory/job/task/memory.usage_in_bytes": "100",
                "sys/fs/cgroup/pids/pids.max": "100",  # its path is one of the host: the mount is the container's own
                "sys/fs/cgroup/pids/pids.current": "30",
            },
            1.5,
            cgroups.Grant(8000, 3000),
            cgroups.Grant(100, 30),
        ),
        (
            {
                **CGROUP_V2,
                "sys/fs/cgroup/slice/cpu.max": "max 100000",
                "sys/fs/cgroup/slice/job/cpu.max": "400000 100000",
                "sys/fs/cgroup/slice/memory.max": "5000",
                "sys/fs/cgroup/slice/memory.current": "4900",
                "sys/fs/cgroup/slice/job/memory.max": "max",
                "sys/fs/cgroup/slice/job/pids.max": "max",
            },
            4.0,
            cgroups.Grant(5000, 4900),
            None,
        ),
    ],
)
def test_control_groups_of_both_versions_are_read(
    files: dict[str, str],
    cores: float | None,
    memory: cgroups.Grant | None,
    processes: cgroups.Grant | None,
    tmp_path: Path,
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = cgroups.cpu_quota(tmp_path), cgroups.memory(tmp_path), cgroups.processes(tmp_path)
    assert found == (cores, memory, processes)


def test_affinity_to_one_core_counts() -> None:
    if (os.cpu_count() or 1) < 2:
        pytest.skip("one core is all there is")
    found = limits_of_a_child("os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])")
    assert found["cores"]["found"] == f"1 usable of {os.cpu_count()} in the machine (affinity)"
    assert found["threads"]["found"].startswith("1 per process")


def test_data_workers_of_the_config_are_counted_against_cores_and_memory(tmp_path: Path) -> None:
    config = load("quickstart", ["data.workers=4000", "data.prefetch=4", "data.batch_size=1000"])
    setting = Setting(tmp_path, World(0, 2, 0, 2, launched=True), config)
    cores = only(doctor_limits.cores(setting))
    assert cores.status == "warning" and "2 × (1 process + 4000 data workers) want 8002" in cores.found
    assert cores.remedy is not None and "data.workers=" in cores.remedy
    assert status(doctor_limits.memory(setting)) == "problem"
    shared = only(doctor_limits.shared_memory(setting))
    assert shared.status == "warning" and "32000 batches of 1000 pictures of 224×224" in shared.found


def test_more_processes_than_cores_are_told(tmp_path: Path) -> None:
    check = only(doctor_limits.cores(Setting(tmp_path, World(0, 4096, 0, 4096, launched=True))))
    assert check.status == "warning" and check.found.endswith("for 4096 processes")


def test_memory_is_that_of_the_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "memory", lambda: cgroups.Grant(2 * 10**9, 10**9 // 2))
    check = only(doctor_limits.memory(Setting(tmp_path)))
    assert check.status == "warning" and "1.5 GB free of 2.0 GB that the control group grants" in check.found


def test_threads_that_would_spin_beside_busy_neighbours_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    if cgroups.cpu_quota() is not None or len(os.sched_getaffinity(0)) != os.cpu_count() or os.cpu_count() == 1:
        pytest.skip("only a part of this machine's cores is ours to judge")
    monkeypatch.setenv("OMP_NUM_THREADS", str(os.cpu_count()))
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    spin = [sys.executable, "-c", "while True: pass"]
    neighbours = [subprocess.Popen(spin) for _ in range(os.cpu_count() or 1)]
    try:
        told = wait_until(lambda: [c for c in doctor_limits.threads(Setting(Path("."))) if c.status != "ok"], "it")
        assert told[0].remedy == "set OMP_WAIT_POLICY=PASSIVE, so that threads that wait don't spin"
        monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
        assert status(doctor_limits.threads(Setting(Path(".")))) == "ok"
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


def test_a_small_dev_shm_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "shm", "64m") as shm:
        monkeypatch.setattr(doctor_limits, "SHARED_MEMORY", shm)
        check = only(doctor_limits.shared_memory(Setting(tmp_path)))
        assert check.status == "warning" and "--shm-size" in (check.remedy or "")
        without_workers = Setting(tmp_path, config=load("quickstart", ["data.workers=0"]))
        assert status(doctor_limits.shared_memory(without_workers)) == "ok"
    with small_disk(tmp_path / "tiny", "1m") as shm:
        monkeypatch.setattr(doctor_limits, "SHARED_MEMORY", shm)
        assert status(doctor_limits.shared_memory(without_workers)) == "problem"


def test_a_read_only_file_system_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = tmp_path / "fixed"
    fixed.mkdir()
    with read_only(fixed):
        check = only(doctor_files.room(Setting(fixed / "runs")))
        assert check.status == "problem" and f"{fixed}/runs can't be written: Read-only file system" in check.found
        assert status(doctor_files.locks(Setting(fixed))) == "warning"
        assert "agrees" not in only(doctor_files.clock(Setting(fixed))).found
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
        assert f"{fixed} can't be written" in only(doctor_mlflow.mlflow(Setting(fixed))).found


def test_little_room_is_told_by_bytes_and_by_files(tmp_path: Path) -> None:
    with small_disk(tmp_path / "a", "50m") as folder:
        check = only(doctor_files.room(Setting(folder)))
        assert check.status == "problem" and "(tmpfs): 52 MB of 52 MB free" in check.found
        assert "not measured" in only(doctor_files.speed(Setting(folder))).found
    with small_disk(tmp_path / "b", "1g") as folder:
        assert status(doctor_files.room(Setting(folder))) == "warning"
        (check,) = doctor_files.speed(Setting(folder))
        assert check.status in ("ok", "warning") and "(67 MB each)" in check.found
        assert not list(folder.iterdir())
    with small_disk(tmp_path / "c", "20g,nr_inodes=50") as folder:
        check = only(doctor_files.room(Setting(folder)))
        assert check.status == "problem" and "room for 49 more files" in check.found
    with small_disk(tmp_path / "d", "20g,nr_inodes=100k") as folder:
        check = only(doctor_files.room(Setting(folder)))
        assert check.status == "warning" and "gone when the machine restarts" in check.found


def test_a_folder_that_is_a_file_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    assert only(doctor_files.room(Setting(tmp_path / "runs" / "mine"))).found == f"{tmp_path / 'runs'} is a file"


def test_a_limit_on_what_may_be_written_is_a_problem(tmp_path: Path) -> None:
    code = f"""
import resource
from pathlib import Path
from trainer.doctor import files as doctor_files
from trainer.doctor import Setting
resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
(check,) = doctor_files.speed(Setting(Path({str(tmp_path)!r})))
print(check.status, check.found)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout == "problem writing 67 MB failed: File too large\n", done.stderr
    assert not list(tmp_path.iterdir())


def test_other_bytes_than_were_written_are_noticed(tmp_path: Path) -> None:
    piece = os.urandom(doctor_files.PIECE)
    (tmp_path / "x").write_bytes(2 * piece)
    with (tmp_path / "x").open("r+b") as file:
        assert doctor_files.read_back(file.fileno(), piece, 2 * len(piece)) is not None
        file.seek(len(piece) + 5)
        file.write(bytes([piece[5] ^ 1]))
        file.flush()
        assert doctor_files.read_back(file.fileno(), piece, 2 * len(piece)) is None


def test_locks_and_renames_work_on_this_disk(tmp_path: Path) -> None:
    assert status(doctor_files.locks(Setting(tmp_path / "not" / "there"))) == "ok"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("synchronised", "stamp", "expected", "said"),
    [
        (True, 100.5, "ok", "synchronised; the runs' file system agrees"),
        (None, 99.99, "ok", "the kernel doesn't say; the runs' file system agrees"),
        (False, 100.0, "warning", "not synchronised, says the kernel; the runs' file system agrees"),
        (True, 104.0, "warning", "the runs' file system is 3.0 s ahead"),
        (True, 40.0, "problem", "the runs' file system is 60.0 s behind"),
    ],
)
def test_clocks_are_compared(synchronised: bool | None, stamp: float, expected: str, said: str) -> None:
    check = only(doctor_files.judge_clock(synchronised, doctor_files.difference(stamp, 100.0, 101.0)))
    assert check.status == expected and said in check.found


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_the_kernel_is_asked_whether_its_clock_is_synchronised() -> None:
    import ctypes

    # ntp_gettime(3), another call of the same kernel, answers TIME_ERROR where it is not.
    answer = ctypes.CDLL(None).ntp_gettime(ctypes.create_string_buffer(256))
    assert doctor_files.synchronised() is {-1: None, 5: False}.get(answer, True)

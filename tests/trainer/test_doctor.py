"""`trainer doctor`: the command in a sick environment, the guard around each check, and the all-reduce."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from disks import fill, small_disk
from faults import control_group, only
from harness import ROOT, environment
from mlflow_servers import accepting_and_silent
from processes import wait_until

from trainer import cli, local_ranks
from trainer.commands.doctor import show
from trainer.doctor import Check, Probe, Setting, examine, listed, ok, problem, size, worst
from trainer.doctor import allreduce as doctor_allreduce
from trainer.doctor import mlflow as doctor_mlflow
from trainer.local_ranks import free_port
from trainer.world import World

LINES = [
    *("python", "packages", "devices", "driver", "cores", "threads", "memory", "shared memory", "runs folder"),
    *("disk speed", "file locks", "open files", "processes", "interfaces", "names", "clock", "MLflow", "all-reduce"),
]
BY_HAND = """
import time, torch, torch.distributed as dist
dist.init_process_group("gloo")
tensor, seconds = torch.ones(16 * 1024 * 1024), []
for _ in range(6):
    dist.barrier()
    start = time.perf_counter()
    dist.all_reduce(tensor)
    seconds.append(time.perf_counter() - start)
print(64 * 1.048576e6 / sorted(seconds)[3])
dist.destroy_process_group()
"""


def doctor(
    cwd: Path, *args: str, before: Callable[[], None] | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainer", "doctor", *args]
    variables = {**environment(), "MLFLOW_TRACKING_URI": "", **env}
    return subprocess.run(
        command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=120, preexec_fn=before
    )


def test_the_report_as_json_has_every_check_and_a_remedy_for_each_fault(tmp_path: Path) -> None:
    started = time.monotonic()
    done = doctor(tmp_path, "--json")
    seconds = time.monotonic() - started
    report = json.loads(done.stdout)
    names = [check["name"] for check in report["checks"] if check["name"] != "all-reduce (nccl)"]
    assert names == LINES, done.stderr
    for check in report["checks"]:
        assert set(check) == {"name", "status", "found", "remedy"}
        assert (check["status"] == "ok") == (check["remedy"] is None), check
        assert check["found"]
    assert report["status"] == worst(check["status"] for check in report["checks"])
    assert done.returncode == (1 if report["status"] == "problem" else 0)
    by_name = {check["name"]: check for check in report["checks"]}
    assert by_name["all-reduce"]["status"] in ("ok", "warning"), by_name["all-reduce"]
    assert by_name["packages"]["status"] == "ok", by_name["packages"]
    assert not list(tmp_path.iterdir()), "something is left behind"
    assert seconds < 60, "it takes 5 to 8 s on two cores"


def test_a_sick_environment_is_told_line_by_line_with_exit_code_1(tmp_path: Path) -> None:
    with small_disk(tmp_path / "full", "1m") as full, accepting_and_silent() as address:
        fill(full)
        done = doctor(
            tmp_path,
            f"--runs-dir={full}/runs",
            before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100)),
            GLOO_SOCKET_IFNAME="bogus0",
            MASTER_ADDR="nowhere.invalid",
            MLFLOW_TRACKING_URI=address.replace("//", "//me:hunter2@"),
            OMP_NUM_THREADS="many",
        )
    assert done.returncode == 1, done.stderr
    said = {line[9:23].strip(): line for line in done.stdout.splitlines() if line.startswith(("ok", "warn", "prob"))}
    assert list(said) == LINES, "each is one line, also where another fails"
    expected = {
        "threads": "warning  threads         OMP_NUM_THREADS=many is no number → set OMP_NUM_THREADS=",
        "runs folder": f"problem  runs folder     {full}/runs is full: No space left on device → delete old runs",
        "disk speed": "warning  disk speed      not measured",
        "file locks": "warning  file locks      not tried: No space left on device → see `runs folder`",
        "open files": "problem  open files      100 per process (raisable to 100); a process of this run wants ",
        "interfaces": "problem  interfaces      GLOO_SOCKET_IFNAME: there is no interface bogus0 → name one of: ",
        "names": "problem  names           MASTER_ADDR=nowhere.invalid does not resolve: ",
        "MLflow": f"problem  MLflow          {address}: no answer within 4 s → start the server",
    }
    for name, beginning in expected.items():
        assert said[name].startswith(beginning), said[name]
    assert " failed at meeting the others: " in said["all-reduce"] and "bogus0" in said["all-reduce"]
    assert "hunter2" not in done.stdout + done.stderr
    problems = sum(line.startswith("problem  ") for line in done.stdout.splitlines())
    assert done.stdout.splitlines()[-1].startswith(f"{len(LINES)} checks: {problems} problems and ")


def test_without_a_single_thread_more_what_can_be_checked_is_checked(tmp_path: Path) -> None:
    with control_group("pids", {"pids.max": "1"}, {"pids.max": "1"}) as procs:
        done = doctor(tmp_path, before=lambda: procs.write_text(str(os.getpid())) and None)
    assert done.returncode == 1, done.stderr
    assert "problem  processes       1 of the 1 that the control group grants are used" in done.stdout
    assert "problem  all-reduce      this check failed: BlockingIOError: " in done.stdout
    assert "ok       file locks" in done.stdout


def test_two_nodes_report_to_rank_0_and_both_fail(tmp_path: Path) -> None:
    with small_disk(tmp_path / "full", "1m") as full:
        fill(full)
        launcher = [
            *("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"),
            *(f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1"),
        ]
        started = []
        for folder in ("runs", f"{full}/runs"):
            command = [sys.executable, *launcher, "-m", "trainer", "doctor", f"--runs-dir={folder}"]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            started.append(subprocess.Popen(command, cwd=tmp_path, env=environment(), text=True, **pipes))
        try:
            outputs = [process.communicate(timeout=120) for process in started]
        finally:
            for process in started:
                process.kill()
    assert [process.returncode for process in started] == [1, 1], outputs
    (out, _), (other_out, other_err) = sorted(outputs, key=lambda output: -len(output[0]))
    assert other_out == ""
    host = socket.gethostname()
    # Which of the two became node 0 is torchrun's choice.
    if f"problem  {host}: runs folder" in out:
        assert f"rank 1 on {host}: problem  job             not fit to start → rank 0 lists what is wrong" in other_err
    else:
        assert "problem  runs folder" in out and f"rank 1 on {host}: problem  job" in other_err
    assert "ok       all-reduce      gloo, 2 processes: " in out or "warning  all-reduce      gloo, 2 proc" in out


def test_the_page_explains_every_line() -> None:
    page = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    table = "".join(line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `"))
    assert not [name for name in LINES if f"`{name}`" not in table or f"  {name} " not in page]


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from trainer.cli import main; main(['doctor', '--help']); sys.exit('torch' in sys.modules and 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--runs-dir FOLDER" in done.stdout and "--config FILE" in done.stdout


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["seed=1"], "overrides change a config: name one by --config FILE"),
        (["--timeout", "0"], "--timeout 0: wanted more than 0 seconds"),
        (["--config", "quickstart", "data.worker=1"], "unknown key 'worker'"),
    ],
)
def test_a_mistake_in_what_is_asked_ends_it(argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", *argv]) == 2
    assert expected in capsys.readouterr().err


def test_a_terminal_is_given_lines_of_its_width(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show(Check("disk speed", "problem", "word " * 30, "do something about it, " * 5))
    first, *more = capsys.readouterr().out.splitlines()
    assert first.startswith("\033[1;31mproblem\033[0m  disk speed      word word")
    assert len(more) == 5 and all(line.startswith(" " * 25) and len(line) <= 80 for line in more)
    assert more[2].strip().startswith("→ do something")


def test_a_check_that_crashes_is_a_problem_that_names_the_exception(capsys: pytest.CaptureFixture[str]) -> None:
    def crash() -> list[Check]:
        raise KeyError("http://me:hunter2@host/")

    check = only(examine(Probe("x", crash)))
    assert (check.name, check.status) == ("x", "problem")
    assert check.found == "this check failed: KeyError: 'http://me@host/'"
    assert capsys.readouterr().err == ""
    examine(Probe("x", crash), debug=True)
    assert "in crash" in capsys.readouterr().err


def test_a_check_that_hangs_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "mlflow.db")  # whoever opens it waits for the other end
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    probe = Probe("MLflow", lambda: doctor_mlflow.mlflow(Setting(tmp_path)), 0.3, "wake it up")
    assert examine(probe) == problem("MLflow", "no answer within 0.3 s", "wake it up")
    os.close(os.open(tmp_path / "mlflow.db", os.O_RDWR | os.O_NONBLOCK))


def test_sizes_and_lists_are_short() -> None:
    assert [size(n) for n in (12, 64e6, 1.5e9, 2.5e12, 99e12)] == ["12 bytes", "64 MB", "1.5 GB", "2.5 TB", "99 TB"]
    assert listed("abcdef") == "a, b, c, d and 2 more" and listed("ab") == "a, b"
    assert worst([]) == "ok" and worst(["warning", "problem", "ok"]) == "problem"


def rank_1() -> int:
    """The process of rank 1 among the all-reduce's, once it is there."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and b"trainer.doctor.allreduce" in (entry / "cmdline").read_bytes():
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == os.getpid() and b"\0RANK=1\0" in b"\0" + (entry / "environ").read_bytes():
                    return int(entry.name)
        except OSError:  # it has just ended
            continue
    return 0


def all_reduce_while(what: Callable[[int], None], seconds: float) -> Check:
    """The line of an all-reduce during which something happens to rank 1."""
    found: list[list[Check]] = []
    # Short-lived threads must not start ranks, which end with the thread that started them.
    thread = threading.Thread(target=lambda: found.append(doctor_allreduce.all_reduce(Setting(Path(".")), seconds)))
    thread.start()
    what(wait_until(rank_1, "rank 1"))
    thread.join(60)
    return only(found[0])


def test_a_rank_that_hangs_is_named_with_where_it_is() -> None:
    check = all_reduce_while(lambda pid: os.kill(pid, signal.SIGSTOP), 8.0)
    assert check.status == "problem"
    assert check.found.endswith("rank 1 is at the import of torch"), check.found
    assert rank_1() == 0, "it is still there"


def test_a_rank_that_is_killed_is_named() -> None:
    check = all_reduce_while(lambda pid: os.kill(pid, signal.SIGKILL), 30.0)
    assert check.found.startswith("rank 1 failed at the import of torch: ended by SIGKILL"), check.found


def test_ranks_that_cannot_meet_in_time_say_so() -> None:
    check = only(doctor_allreduce.all_reduce(Setting(Path(".")), 0.2))
    assert check.found == "no end within 0.2 s: rank 0, 1 is at the import of torch"


def test_bandwidth_is_what_is_measured_by_hand(tmp_path: Path) -> None:

    check = only(doctor_allreduce.all_reduce(Setting(tmp_path), 60))
    told = float(check.found.split("processes: ")[1].split(" GB/s")[0])
    with local_ranks.start([sys.executable, "-c", BY_HAND], 2, tmp_path / "logs") as ranks:
        assert ranks.wait(60) == [0, 0]
    by_hand = float(ranks.output(0).splitlines()[-1]) / 1e9
    # A factor of 8 would be bits for bytes; the load of the machine changes in between.
    assert by_hand / 5 < told < by_hand * 5, (told, by_hand)


@pytest.mark.parametrize(
    ("backend", "seconds", "ranks", "expected", "said"),
    [
        ("gloo", 0.1, 2, "ok", "gloo, 2 processes: 0.67 GB/s (67 MB), 200 µs for one number"),
        ("gloo", 1.0, 2, "warning", "0.067 GB/s (67 MB), 200 µs for one number: slow"),
        ("nccl", 0.001, 8, "ok", "nccl, 8 processes: 1.2e+02 GB/s"),
        ("nccl", 0.2, 8, "warning", "slow"),
    ],
)
def test_bandwidth_is_that_of_each_link(backend: str, seconds: float, ranks: int, expected: str, said: str) -> None:
    figures = {"backend": backend, "bytes": 64 * 1024 * 1024, "seconds": seconds, "latency": 2e-4}
    check = doctor_allreduce.judge(figures, ranks)
    assert check.status == expected and said in check.found


def test_a_world_of_one_process_exchanges_nothing() -> None:
    assert doctor_allreduce.all_reduce(Setting(Path("."), World(launched=True)), 1.0) == ok(
        "all-reduce", "a world of one process has nothing to exchange"
    )

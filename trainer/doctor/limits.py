"""`trainer doctor`: what this process may use of the machine: cores, threads, memory, files, processes. No torch.

What a run takes was measured with the quickstart on a CPU, two ranks with two data workers each: a rank 45 open files,
14 threads and 0.65 GB of its own, a data worker 47 open files, 3 threads and 0.14 GB, the mirror to MLflow 0.2 GB.
"""

from __future__ import annotations

import math
import os
import resource
import sys
from pathlib import Path

from trainer.doctor import GB, MB, Check, Setting, cgroups, ok, problem, size, warning

MEMORY_OF_RANK = 1.0 * GB
"""Measured 0.65 GB, with the mirror 0.85 GB, before any data or model of notable size."""
MEMORY_OF_WORKER = 0.15 * GB

SHARED_MEMORY = Path("/dev/shm")
SHARED_LEAST = 16 * MB
"""Below it not even small batches pass, nor do NCCL's own buffers, some 10 MB a rank."""
SHARED_USUAL = 1 * GB
"""Where no config says what is needed: a few workers with batches of pictures; Docker gives 64 MiB by default."""
BYTES_OF_PICTURE = 3 * 224 * 224 * 4
"""A sample as most vision models take it, as float32: the yardstick for batches on their way from the workers."""

FILES_OF_RANK = 128
"""Measured 45 with two workers; the rest is for the files of larger data sets and a GPU's libraries."""
FILES_USUAL = 1024
"""The usual soft limit of Linux: less was set on purpose, or forgotten."""
FILES_PER_BATCH = 4
"""Torch hands each tensor of a batch from worker to rank as an open file: inputs, targets, and some more."""
SOCKETS_PER_RANK = 2
"""A rank holds a connection to each other rank in both of its groups, that of the gradients and the control group."""

THREADS_OF_RANK = 64
"""Measured 14 with one thread for OpenMP; NCCL, CUDA and pinning of memory bring more."""
THREADS_OF_WORKER = 4
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")
BUSY_SHARE = 0.5
"""Where others use more than this share of the cores, threads that spin while they wait cost the most."""


def cores(setting: Setting) -> list[Check]:
    """Cores this process may run on: affinity and quota, against the processes that would share them."""
    granted, quota = _affinity(), cgroups.cpu_quota()
    usable = _usable(granted, quota)
    found = f"{usable:g} usable of {os.cpu_count()} in the machine"
    if quota is not None and quota < granted:
        found += " (quota of the control group)"
    elif granted < (os.cpu_count() or granted):
        found += " (affinity)"
    ranks = setting.world.local_size
    wanted = ranks * (1 + setting.workers)
    if wanted <= max(usable, 1):
        return ok("cores", found)
    fitting = max(math.floor(usable / ranks) - 1, 0)
    if setting.workers:
        found += f"; {ranks} × (1 process + {setting.workers} data workers) want {wanted}"
        return warning("cores", found, f"ask the scheduler for {wanted} cores, or set data.workers={fitting}")
    return warning("cores", f"{found}, for {ranks} processes", f"ask for {ranks} cores, or start fewer processes")


def threads(setting: Setting) -> list[Check]:
    """Threads that torch's OpenMP takes per process, and how they wait."""
    granted, quota = _affinity(), cgroups.cpu_quota()
    usable, ranks = _usable(granted, quota), setting.world.local_size
    text, policy = values = [os.environ.get(name, "") for name in VARIABLES]
    fitting = max(math.floor(usable / ranks), 1)
    first = text.split(",")[0].strip() if text else str(granted)  # a list is for nested regions
    if not first.isdecimal() or int(first) == 0:
        return warning("threads", f"OMP_NUM_THREADS={text} is no number", f"set OMP_NUM_THREADS={fitting}")
    num = int(first)
    said = [f"{name}={value}" if value else f"{name} not set" for name, value in zip(VARIABLES, values, strict=True)]
    found = f"{num} per process ({', '.join(said)})"
    if num * ranks > max(math.ceil(usable), ranks):
        found += f", {num * ranks} on {usable:g} cores: they wait for each other"
        return warning("threads", found, f"set OMP_NUM_THREADS={fitting}")
    if num > 1 and policy.lower() != "passive" and _others_share() > BUSY_SHARE:
        found += ", and other processes keep the cores busy"
        return warning("threads", found, "set OMP_WAIT_POLICY=PASSIVE, so that threads that wait don't spin")
    return ok("threads", found)


def memory(setting: Setting) -> list[Check]:
    """Memory that is left, of the machine and of the control group."""
    import psutil

    machine, grant = psutil.virtual_memory(), cgroups.memory()
    total, free, of = machine.total, machine.available, "in the machine"
    if grant is not None and grant.limit < total:
        total, free, of = grant.limit, min(free, grant.free), "that the control group grants"
    found = f"{size(free)} free of {size(total)} {of}"
    ranks = setting.world.local_size
    needed = ranks * (MEMORY_OF_RANK + setting.workers * MEMORY_OF_WORKER)
    if free >= 2 * needed:
        return ok("memory", found)
    found += f"; {ranks} process(es) with their data workers take {size(needed)} before any data"
    remedy = "end other programs, ask for more memory, or take fewer processes or data.workers"
    return problem("memory", found, remedy) if free < needed else warning("memory", found, remedy)


def shared_memory(setting: Setting) -> list[Check]:
    """Room in /dev/shm, through which data workers hand over batches; without it they die of SIGBUS."""
    if not SHARED_MEMORY.is_dir():
        if sys.platform == "linux":
            return problem("shared memory", f"there is no {SHARED_MEMORY}", "mount a tmpfs there; data workers need it")
        return ok("shared memory", "this system has no /dev/shm that could be small")
    room = os.statvfs(SHARED_MEMORY)
    free, total = room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize
    found = f"{size(free)} free of {size(total)} in {SHARED_MEMORY}"
    needed, what = SHARED_USUAL, "a few data workers with pictures"
    if setting.config is not None:
        loading = setting.config.loading
        batches = setting.world.local_size * loading.workers * loading.prefetch
        needed = batches * loading.batch_size * BYTES_OF_PICTURE
        what = (
            f"{batches} batches of {loading.batch_size} pictures of 224×224 (data.workers × data.prefetch × processes)"
        )
    remedy = "start the container with --shm-size=8g (Kubernetes: an emptyDir of medium Memory at /dev/shm)"
    if free < SHARED_LEAST:
        return problem("shared memory", found, remedy)
    if free < needed:
        return warning("shared memory", f"{found}; {what} take {size(needed)}", f"{remedy}, or lower data.prefetch")
    return ok("shared memory", found)


def open_files(setting: Setting) -> list[Check]:
    """The soft limit of open files, against ranks' connections and batches on their way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return ok("open files", "no limit")
    prefetch = setting.config.loading.prefetch if setting.config else 1
    batches = setting.workers * prefetch * FILES_PER_BATCH
    needed = FILES_OF_RANK + batches + SOCKETS_PER_RANK * setting.world.size
    highest = "no limit" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    found = f"{soft:,} per process (raisable to {highest})"
    if soft >= max(FILES_USUAL, needed):
        return ok("open files", found)
    wanted = max(4 * FILES_USUAL, 2 * needed)
    allow = "have more allowed (limits.conf, LimitNOFILE=, docker --ulimit nofile=)"
    if hard == resource.RLIM_INFINITY or hard >= wanted:
        remedy = f"ulimit -n {wanted} before the start"
    else:
        remedy = f"ulimit -n {hard}, and {allow}" if soft < hard else allow
    if soft < needed:
        return problem("open files", f"{found}; a process of this run wants up to {needed:,}", remedy)
    return warning("open files", found, remedy)


def processes(setting: Setting) -> list[Check]:
    """How many more processes and threads may be started: the user's limit and that of the control group."""
    ranks = setting.world.local_size
    needed = ranks * (THREADS_OF_RANK + setting.workers * THREADS_OF_WORKER)
    limits: list[tuple[int, str, str]] = []
    grant = cgroups.processes()
    if grant is not None:
        text = f"{grant.used:,} of the {grant.limit:,} that the control group grants"
        limits.append((grant.free, text, "raise pids.max (docker --pids-limit, Kubernetes podPidsLimit)"))
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY and os.geteuid() != 0:  # root is not held by it
        used = _threads_of_user()
        text = f"{used:,} of the {soft:,} of this user"
        limits.append((max(soft - used, 0), text, "raise `ulimit -u` (limits.conf, TasksMax=)"))
    if not limits:
        return ok("processes", "no limit")
    free, text, remedy = min(limits)
    found = f"{text} are used (threads count)"
    if free >= 4 * needed:
        return ok("processes", found)
    found += f"; this run takes about {needed:,}"
    return problem("processes", found, remedy) if free < needed else warning("processes", found, remedy)


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _usable(granted: int, quota: float | None) -> float:
    return granted if quota is None else min(granted, round(quota, 2))


def _others_share() -> float:
    """Share of the machine's cores that is busy right now; 0 where only a part of them is ours to judge."""
    import psutil

    whole = cgroups.cpu_quota() is None and _affinity() == os.cpu_count()
    return psutil.cpu_percent(interval=0.2) / 100 if whole else 0.0


def _threads_of_user() -> int:
    """Threads of all processes of this user, which is what the kernel counts."""
    import psutil

    own = os.getuid()
    found = 0
    for process in psutil.process_iter(["uids", "num_threads"]):
        uids = process.info["uids"]
        if uids is not None and uids.real == own:
            found += process.info["num_threads"] or 0
    return found

"""`trainer doctor`: an all-reduce between processes, with its bandwidth.

`python -m trainer.doctor.allreduce DEADLINE [FILE]` is one rank of it; what it prints, a JSON object a line, is how the
process that started it knows how far it came. FILE holds what this rank's node has to report to rank 0.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import environment, local_ranks
from trainer.doctor import GB, Check, Setting, ok, problem, size, warning
from trainer.world import World

if TYPE_CHECKING:
    import torch

NAME = "all-reduce"
LOCAL_RANKS = 2
LARGE, SMALL = 64 * 1024 * 1024, 4 * 1024 * 1024
"""Bytes: the gradients of 17 million parameters in fp32; on a line where that takes long, those of 1 million."""
LONG = 1.0
"""Seconds that one exchange of `LARGE` may take."""
ROUNDS = 5
MARGIN = 1.0
"""Seconds before the deadline at which a rank gives up by itself: torch's own reason says more than ours."""
SLOWEST_NODE = 60.0
"""Seconds more in a world that a launcher made: the checks of another node, which come first, may take that long."""
SLOW = {"gloo": 0.1 * GB, "nccl": 1.0 * GB}
"""Bytes per second. Gloo: a line of 1 Gbit/s gives 0.12; between processes of one machine with two cores, 1.0 to 1.5
was measured. NCCL: a line of 10 Gbit/s gives 1.2, PCI Express and faster networks a multiple."""
STEPS = ("the import of torch", "meeting the others", "the all-reduce itself")
"""What a rank is at, in this order."""
_SOURCE_LINE = re.compile(r"\[enforce fail at [^]]*\] ")
"""What gloo puts before its reasons."""


def all_reduce(setting: Setting, seconds: float, report: Sequence[Check] = ()) -> list[Check]:
    """The lines about the exchange as this rank knows it and, on rank 0 of several nodes, what the others report.

    Between two processes of this machine, or all of a launched world, of which this process then starts one.
    """
    world = setting.world
    if world.launched and world.size == 1:
        return ok(NAME, "a world of one process has nothing to exchange")
    with tempfile.TemporaryDirectory(prefix="trainer-doctor-") as folder:
        argv = [sys.executable, "-m", "trainer.doctor.allreduce"]
        if world.launched:
            seconds += SLOWEST_NODE
            file = Path(folder, "report.json")
            file.write_text(json.dumps([asdict(check) for check in report]))
            argv += [str(time.time() + seconds - MARGIN), str(file)]
            ranks = local_ranks.start(argv, 1, Path(folder), env=dict(os.environ))
        else:
            argv += [str(time.time() + seconds - MARGIN)]
            ranks = local_ranks.start(argv, LOCAL_RANKS, Path(folder))
        with ranks:
            reason = _failure(ranks, seconds, world.rank)
            said = _said(ranks.output(0))
    size_of_world = world.size if world.launched else LOCAL_RANKS
    lines = [judge(result, size_of_world) for result in said if "backend" in result]
    if reason is not None:
        where = "between the nodes open all TCP ports, and name the interface that they share: GLOO_SOCKET_IFNAME"
        here = "see `interfaces`, `names` and `memory`; --timeout SECONDS gives it longer"
        lines += problem(NAME, reason, where if world.num_nodes > 1 else here)
    for word in said:
        if "nodes" in word and world.num_nodes > 1:
            lines += [Check(**entry) for entry in word["nodes"]] or ok("other nodes", "nothing to report")
        if word.get("failed") and not world.is_main:
            lines += problem("job", "not fit to start", "rank 0 lists what is wrong")
    return lines


def judge(result: dict[str, Any], size_of_world: int) -> Check:
    """The line for one backend's figures."""
    backend, num_bytes, seconds = result["backend"], result["bytes"], result["seconds"]
    # Bus bandwidth as NCCL's tests define it: what each link carries, whatever the number of ranks.
    rate = num_bytes / seconds * 2 * (size_of_world - 1) / size_of_world
    name = NAME if backend == "gloo" else f"{NAME} ({backend})"
    latency = f"{1e6 * result['latency']:,.0f} µs for one number"
    found = f"{backend}, {size_of_world} processes: {rate / GB:.2g} GB/s ({size(num_bytes)}), {latency}"
    if rate >= SLOW[backend]:
        return ok(name, found)[0]
    remedy = (
        "look at the load of this machine (top), and which interface is used (GLOO_SOCKET_IFNAME)"
        if backend == "gloo"
        else "NCCL_DEBUG=INFO shows the path that it takes; name the fast interface in NCCL_SOCKET_IFNAME"
    )
    return warning(name, f"{found}: slow", remedy)[0]


def _failure(ranks: local_ranks.LocalRanks, seconds: float, first: int) -> str | None:
    """Why the exchange did not come to its end, in one line; None when it did. `first` is the rank of the first."""
    end = time.monotonic() + seconds
    while None in (codes := ranks.poll()) and time.monotonic() < end:
        if any(codes):  # the first to fail is the cause; the others fail for want of it
            break
        time.sleep(local_ranks.POLL_SECONDS)
    failed = [rank for rank, code in enumerate(codes) if code]
    if failed:
        # Where two are found together, the one that was killed is the cause: the other lost its peer.
        rank = min(failed, key=lambda rank: codes[rank] != -signal.SIGKILL)
        others = [f"; rank {first + r} is at {_step(ranks.output(r))}" for r, code in enumerate(codes) if code is None]
        reason = _last_words(output := ranks.output(rank), codes[rank] or 0)
        return f"rank {first + rank} failed at {_step(output)}: {reason}{''.join(others)}"
    behind = [rank for rank, code in enumerate(codes) if code is None]
    if behind:
        at = {rank: _step(ranks.output(rank)) for rank in behind}
        least = min(at.values(), key=STEPS.index)
        names = ", ".join(str(first + rank) for rank in behind if at[rank] == least)
        return f"no end within {seconds:g} s: rank {names} is at {least}"
    return None


def _step(output: str) -> str:
    """What a rank is at."""
    return next((word["step"] for word in reversed(_said(output)) if "step" in word), STEPS[0])


def _said(output: str) -> list[dict[str, Any]]:
    """The JSON lines among what a rank printed; torch prints, too."""
    whole = output[: output.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines() if line.startswith('{"')]


def _last_words(output: str, code: int) -> str:
    told = [str(word["error"]) for word in _said(output) if "error" in word]
    if code < 0 and not told:
        return f"ended by {signal.Signals(-code).name}"
    lines = told or [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {code}"


# -- one rank ---------------------------------------------------------------------------------------------------------


def main(deadline: float, report: Path | None) -> None:
    """Meet the others, exchange, and on rank 0 print what came out."""
    import torch
    import torch.distributed as dist

    from trainer.world import from_environment

    _say(step=STEPS[1])
    world = from_environment()
    left = timedelta(seconds=max(deadline - time.time(), MARGIN))
    dist.init_process_group("gloo", timeout=left)
    _say(step=STEPS[2])
    _tell(world, **_measure(torch.device("cpu")), backend="gloo")
    if _has_device_each(world):
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
        _tell(world, **_measure(device, dist.new_group(backend="nccl", timeout=left)), backend="nccl")
    if report is not None:
        _exchange_reports(world, report)
    dist.destroy_process_group()


def _has_device_each(world: World) -> bool:
    """Whether every rank of every node has a CUDA device of its own: they must agree."""
    import torch
    import torch.distributed as dist

    enough = torch.tensor(int(torch.cuda.is_available() and torch.cuda.device_count() >= world.local_size))
    dist.all_reduce(enough, op=dist.ReduceOp.MIN)
    return bool(enough)


def _measure(device: torch.device, group: Any = None) -> dict[str, float]:
    import torch
    import torch.distributed as dist

    small = torch.ones(SMALL // 4, device=device)
    _timed(small, group)  # connections are made with the first
    slowest = torch.tensor(_timed(small, group), dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
    num_bytes = LARGE if float(slowest) * LARGE / SMALL < LONG else SMALL
    large, one = torch.ones(num_bytes // 4, device=device), torch.ones(1, device=device)
    seconds = sorted(_timed(large, group) for _ in range(ROUNDS))[ROUNDS // 2]
    latency = sorted(_timed(one, group) for _ in range(4 * ROUNDS))[2 * ROUNDS]
    return {"bytes": num_bytes, "seconds": seconds, "latency": latency}


def _timed(tensor: torch.Tensor, group: Any) -> float:
    """Seconds of one all-reduce of a tensor of ones; raises where the sum is not the number of ranks."""
    import torch
    import torch.distributed as dist

    tensor.fill_(1.0)
    dist.all_reduce(torch.zeros(1, device=tensor.device), group=group)  # all are here
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    start = time.perf_counter()
    dist.all_reduce(tensor, group=group)
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    seconds = time.perf_counter() - start
    if not bool((tensor == dist.get_world_size()).all()):
        raise RuntimeError(
            f"the sum of {dist.get_world_size()} ones is wrong: memory or network change what they carry"
        )
    return seconds


def _exchange_reports(world: World, report: Path) -> None:
    """Give rank 0 what the other nodes found, and all of them its verdict."""
    import torch
    import torch.distributed as dist

    store = dist.distributed_c10d._get_default_store()
    entries = json.loads(report.read_text())
    if world.is_main:
        texts = [store.get(f"trainer/doctor/{rank}").decode() for rank in range(1, world.size)]
        others = [entry for text in texts for entry in json.loads(text)]
        _say(nodes=others)
        entries += others
    else:
        named = [{**entry, "name": f"{environment.host()}: {entry['name']}"} for entry in entries]
        store.set(f"trainer/doctor/{world.rank}", json.dumps(named))
    verdict = torch.tensor(int(any(entry["status"] == "problem" for entry in entries)))
    dist.broadcast(verdict, src=0)
    _say(failed=bool(verdict))


def _tell(world: World, **words: Any) -> None:
    if world.is_main:
        _say(**words)


def _say(**words: Any) -> None:
    print(json.dumps(words), flush=True)


if __name__ == "__main__":
    try:
        main(float(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        _say(error=f"{type(error).__name__}: {_SOURCE_LINE.sub('', first_line)}")
        raise

"""What both modes of `trainer verify` share: trainings as processes of their own, and what they say when they fail.

No torch.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer import local_ranks
from trainer.errors import EXIT_DONE, EXIT_PREEMPTED, EXIT_USER, TrainerError, UserError
from trainer.local_ranks import LocalRanks
from trainer.run import Run, find_runs

POLL_SECONDS = 0.05
Say = Callable[[str], None]
Launch = Callable[[Sequence[str], int, Path], LocalRanks]
"""Starts `python ARGV` as so many ranks, with their logs in a folder."""
FOLLOWED = "ended by the failure of"
"""How a rank begins that has nothing of its own to tell, see `errors.Followed`."""
_ERROR = re.compile(r"^trainer: (?:error|failed)(?: on rank \d+)?: (.*?)(?: \(--debug shows the traceback\))?$")


@dataclass(frozen=True)
class Order:
    """What `trainer.verify.probe` trains, and to which of its steps it listens."""

    config: str
    """Path of the YAML."""
    out: str
    """Folder for what was heard."""
    step: int = 1
    """The first step that is listened to."""
    resume: str | None = None
    """Run directory to go on with."""
    stops: bool = False
    """Stop with a checkpoint after the step."""
    global_batch: int | None = None
    """Samples of an optimizer step, where that is not what batch size, processes and accumulation give."""
    across_worlds: bool = False
    """To be compared with another number of processes: what each rank draws for itself is switched off, and there is
    no evaluation."""


def launch(argv: Sequence[str], world_size: int, logs: Path) -> LocalRanks:
    """Start `python ARGV` on this machine."""
    return local_ranks.start([sys.executable, *argv], world_size, logs)


def fit_arguments(config: Path, *overrides: str) -> list[str]:
    """Arguments of python for a training."""
    return ["-m", "trainer", "fit", "--config", str(config), *overrides]


def only_run(runs_dir: Path, name: str) -> Run:
    """The one run of an experiment; TrainerError where it is not alone."""
    runs = find_runs(runs_dir, name)
    if len(runs) != 1:
        raise TrainerError(f"{runs_dir} holds {len(runs)} runs, where one was begun: resume=auto did not go on with it")
    return runs[0]


def finish(ranks: LocalRanks) -> list[int]:
    """Wait for the end of all ranks, for as long as it takes: a training that hangs ends itself."""
    while None in (codes := ranks.poll()):
        time.sleep(POLL_SECONDS)
    return [code for code in codes if code is not None]


def run_probe(order: Order, world_size: int, start: Launch) -> None:
    """Carry out an order; TrainerError with the training's own words where it fails, UserError where it refuses."""
    out = Path(order.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "order.json").write_text(json.dumps(asdict(order)))
    with start(["-m", "trainer.verify.probe", str(out / "order.json")], world_size, out / "logs") as ranks:
        require_done(ranks, finish(ranks), "")


def require_done(ranks: LocalRanks, codes: Sequence[int], what: str) -> None:
    """Raise what the training says of its failure, behind `what`; nothing where it ended well."""
    if any(code != EXIT_DONE for code in codes):
        kind = UserError if EXIT_USER in codes else TrainerError
        raise kind(f"{what}{own_words(ranks, codes)}")


def own_words(ranks: LocalRanks, codes: Sequence[int]) -> str:
    """The line with which a training tells why it ended, or what is known of its end where it told nothing."""
    outputs = [ranks.output(rank).splitlines() for rank in range(len(codes))]
    told = [match[1] for lines in outputs for line in lines if (match := _ERROR.match(line))]
    if told:
        return next((line for line in told if not line.startswith(FOLLOWED)), told[0])
    # Of several ranks, those that were ended by a signal follow the one that ended by itself.
    rank, code = max(((r, c) for r, c in enumerate(codes) if c != EXIT_DONE), key=lambda pair: (pair[1] > 0, -pair[0]))
    if code == EXIT_PREEMPTED:
        return "stopped by a signal from elsewhere"
    end = f"signal {-code}" if code < 0 else f"exit code {code}"
    last = next((line.strip() for line in reversed(outputs[rank]) if line.strip()), "it printed nothing")
    return f"rank {rank} ended with {end}: {last}"

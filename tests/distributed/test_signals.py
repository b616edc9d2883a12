"""A signal ends a training at the next step, with a checkpoint, whole, and on all ranks alike."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soak
from harness import toy_config
from outcome import assert_same_bits, entries, only_run, record
from processes import ForkServer, Training, wait_until

from trainer import checkpoint, health

SECTIONS: dict[str, Any] = {
    "model": {"name": "toy.net", "dropout": 0.2},
    "data": {"samples": 203, "batch_size": 8, "workers": 1, "delay": 0.01},
    "train": {"max_epochs": 2, "ema_decay": 0.9},
    "evaluate": {"every_epochs": None},
}


def start(server: ForkServer, folder: Path, name: str, *overrides: str, processes: int = 1) -> Training:
    config = toy_config(folder, name=name, **SECTIONS)
    return server.start("fit", "--config", str(config), "resume=auto", *overrides, cwd=folder, processes=processes)


def wait_for_steps(folder: Path, name: str, training: Training, after: int) -> None:
    """Until two steps more than `after` are logged."""

    def logged() -> bool:
        files = list((folder / "runs" / name).glob("*/metrics.jsonl"))
        return bool(files) and f'"step": {after + 2},' in files[0].read_text()

    wait_until(lambda: logged() or None not in training.poll(), f"step {after + 2}:\n{training.log()}")


@pytest.mark.parametrize("processes", [1, 2])
def test_each_signal_preempts_and_the_next_attempt_goes_on_to_the_same_bits(
    processes: int, tmp_path: Path, server: ForkServer
) -> None:
    undisturbed = start(server, tmp_path, "undisturbed", processes=processes)
    preempted = [0]
    for number in (signal.SIGTERM, signal.SIGUSR1):
        training = start(server, tmp_path, "stopped", processes=processes)
        wait_for_steps(tmp_path, "stopped", training, preempted[-1])
        # One rank of two is signalled: the others must hear of it. With its data workers, as a scheduler does, and
        # twice, as from a scheduler and from a launcher that passes on what it gets.
        training.send(number, processes - 1, group=True, times=2)
        assert training.wait() == [75] * processes, training.log()
        assert not training.leftovers()
        now = record(only_run(tmp_path, "stopped"))
        assert (now["status"], now["exit_reason"]) == ("preempted", number.name)
        last = entries(only_run(tmp_path, "stopped"))[-1]["step"]
        assert (only_run(tmp_path, "stopped") / "checkpoints" / f"step-{last:08d}" / "manifest.json").is_file()
        (line,) = [text for text in training.log().splitlines() if text.startswith("trainer: ")]
        assert line == (
            f"trainer: preempted: stopped by {number.name} at step {last} with a checkpoint written; "
            f"go on with: trainer fit --resume {only_run(tmp_path, 'stopped')}"
        )
        preempted.append(last)
    assert preempted == sorted(set(preempted))
    training = start(server, tmp_path, "stopped", processes=processes)
    wait_for_steps(tmp_path, "stopped", training, preempted[-1])
    training.send(signal.SIGINT)  # Ctrl-C reaches every process of the terminal
    assert training.wait() == [75] * processes, training.log()
    assert record(only_run(tmp_path, "stopped"))["exit_reason"] == "SIGINT"
    final = start(server, tmp_path, "stopped", processes=processes)
    assert final.wait() == undisturbed.wait() == [0] * processes, final.log()
    assert_same_bits(only_run(tmp_path, "stopped"), only_run(tmp_path, "undisturbed"))
    assert not final.leftovers() and not undisturbed.leftovers()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_run_that_is_stuck_at_once(
    number: signal.Signals, tmp_path: Path, server: ForkServer
) -> None:
    training = start(server, tmp_path, "stuck", "data.delay=1000", "data.workers=0")
    wait_until(lambda: "run directory" in training.log(), "the start")
    wait_until(lambda: _sent_until_handled(training, number), "the end")
    assert training.wait() == [-number]
    assert record(only_run(tmp_path, "stuck"))["status"] == "running"  # nothing could be written; it reads as killed


def _sent_until_handled(training: Training, number: signal.Signals) -> bool:
    training.send(number)
    return None not in training.poll()


def test_data_workers_that_hang_end_with_their_training_process(tmp_path: Path, server: ForkServer) -> None:
    trace = tmp_path / "trace"
    training = start(server, tmp_path, "gone", "data.workers=2", "data.delay=1000", f"data.trace={trace}")
    wait_until(lambda: trace.exists() and len(trace.read_text().splitlines()) >= 16, "both workers to hang")
    training.send(signal.SIGKILL)
    assert training.wait() == [-signal.SIGKILL]
    wait_until(lambda: not training.leftovers(), "the end of the data workers", 10)


SPREAD: dict[str, Any] = {
    "model": {"name": "toy.net", "dropout": 0.2},
    "data": {"samples": 203, "batch_size": 8, "workers": 1, "delay": 0.01, "eval_delay": 0.01},
    "train": {"max_epochs": soak.choose(4, 14), "ema_decay": 0.9},
    "evaluate": {"every_steps": 9},
    "checkpoint": {"every_steps": 10, "keep": 2},
}


@pytest.mark.soak
@pytest.mark.parametrize(("processes", "strategy"), [(1, "auto"), (2, "ddp"), (2, "fsdp")])
def test_signals_at_random_moments_always_end_with_75_and_one_whole_checkpoint(
    processes: int, strategy: str, tmp_path: Path, server: ForkServer, survived: Callable[[str], None]
) -> None:
    def begin(name: str) -> Training:
        config = toy_config(tmp_path, name=name, **SPREAD, strategy={"name": strategy})
        return server.start("fit", "--config", str(config), "resume=auto", cwd=tmp_path, processes=processes)

    undisturbed = begin("undisturbed")
    draw, phases = soak.draw(), Counter[str]()
    signals = soak.choose(4, 20)
    for number in range(signals):
        training = begin("stopped")
        # From the first line that it prints on; what comes before is the start of Python.
        wait_until(lambda t=training: "toy.recipe" in t.log(), "the first line")  # type: ignore[misc]
        pause = time.monotonic() + draw.random() * draw.choice([0.1, 0.5])
        wait_until(lambda p=pause: time.monotonic() > p, "a random moment")  # type: ignore[misc]
        run = next(iter((tmp_path / "runs").glob("stopped/2*")), None)
        sign = health.read(run, 0) if run is not None else None
        phases[sign.phase if sign is not None and sign.pid == training.pids[0] else "set-up"] += 1
        training.send(draw.choice([signal.SIGTERM, signal.SIGUSR1]), draw.randrange(processes), group=True)
        assert training.wait() == [75] * processes, training.log()
        assert not training.leftovers()
        assert_one_whole_checkpoint_more(only_run(tmp_path, "stopped"), number)
    final = begin("stopped")
    assert final.wait() == undisturbed.wait() == [0] * processes, final.log()
    assert_same_bits(only_run(tmp_path, "stopped"), only_run(tmp_path, "undisturbed"))
    places = ", ".join(f"{count} in {phase}" for phase, count in sorted(phases.items()))
    survived(f"{signals} SIGTERMs and SIGUSR1s ({places}): exit 75, a whole checkpoint, nothing left, same bits")


def assert_one_whole_checkpoint_more(run: Path, number: int) -> None:
    """The newest is whole, of the step at which the run says that it was stopped, and nothing is half-written."""
    now = record(run)
    assert now["status"] == "preempted" and len(now["attempts"]) == number + 1
    damaged: list[str] = []
    found = checkpoint.newest_whole(run / "checkpoints", damaged.append)
    assert found is not None and not damaged
    assert found.manifest.step == entries(run)[-1]["step"]
    assert not list((run / "checkpoints").glob(".*"))
    assert all(line.endswith("}") for line in (run / "metrics.jsonl").read_text().splitlines())

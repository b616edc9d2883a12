"""A signal sets a flag, and no more; an echo of it is none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness import toy_config
from processes import wait_until
from stopping import stopping

from trainer import __main__, preemption
from trainer.preemption import Preemption


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_a_signal_sets_the_flag_and_handlers_are_given_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Preemption() as wish:
        assert not wish.requested and wish.signal_name is None
        os.kill(os.getpid(), number)
        assert wish.requested and wish.signal_name == number.name
    assert signal.getsignal(number) is before


def test_the_same_wish_from_a_scheduler_and_a_launcher_is_one() -> None:
    with Preemption() as wish:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert wish.signal_name == "SIGUSR1"  # and this process is still here


def test_an_echo_that_arrives_while_the_first_is_handled_is_an_echo_too() -> None:
    sender = "import os, sys\nfor _ in range(200000): os.kill(int(sys.argv[1]), 15)"
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        with subprocess.Popen([sys.executable, "-c", sender, str(os.getpid())]) as process:
            wishes = 0
            while process.poll() is None:
                with Preemption() as wish:
                    wait_until(lambda wish=wish: wish.requested or process.poll() is not None, "a signal", pause=0)
                    wishes += wish.requested
        assert process.returncode == 0 and wishes > 0
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_after_the_end_does_not_change_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy_config(tmp_path, train={"max_steps": 3})
    monkeypatch.setattr(sys, "argv", ["trainer", "fit", "--config", str(config)])
    before = {number: signal.getsignal(number) for number in preemption.SIGNALS}
    try:
        with monkeypatch.context() as patch:
            stopping(patch, 2)
            assert __main__.main() == 75
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun's, to a rank that is closing down
        for number in preemption.SIGNALS:
            signal.signal(number, before[number])
        assert __main__.main() == 0
        assert {number: signal.getsignal(number) for number in preemption.SIGNALS} == before
    finally:
        for number in preemption.SIGNALS:
            signal.signal(number, before[number])

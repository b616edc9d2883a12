"""A signal sets a flag, and no more; an echo of it is none."""

from __future__ import annotations

import os
import signal

import pytest

from trainer import preemption
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

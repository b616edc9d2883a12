"""Who is waited for: told when it lasts, once, and taken back."""

from __future__ import annotations

import random

import pytest

from trainer.stragglers import Stragglers


def judged(times: list[list[float]], steps: int = 10) -> list[str | None]:
    """Judgements of rank 0 on mean times per window, each over `steps` steps."""
    stragglers = Stragglers(0, len(times[0]))
    told = []
    for window in times:
        for _ in range(steps):
            stragglers.note(window[0])
        assert stragglers.share()[0] == pytest.approx(window[0])
        told.append(stragglers.judge(window))
    return told


def test_a_slow_rank_is_named_after_three_windows_and_once() -> None:
    told = judged([[0.1, 0.1, 0.1]] * 2 + [[0.1, 0.1, 0.2]] * 6 + [[0.1, 0.1, 0.1]] * 2)
    assert [bool(text) for text in told] == [False] * 4 + [True] + [False] * 3 + [True, False]
    assert told[4] == (
        "warning: rank 2 is slow, and the others wait for it: 200 ms a step until its first exchange, the others 100 ms"
    )
    assert told[8] == "rank 2 keeps up with the others again"


def test_windows_of_one_step_take_twenty_of_them() -> None:
    told = judged([[0.1, 0.2]] * 30, steps=1)
    assert [number for number, text in enumerate(told) if text] == [20]


def test_noise_is_no_straggler() -> None:
    draw = random.Random(0)
    assert not any(judged([[draw.uniform(0.1, 0.12) for _ in range(8)] for _ in range(100)]))
    assert not any(judged([[0.0001, 0.0009]] * 10))  # nine times as long, and nothing
    moving = [[0.2 if rank == window % 4 else 0.1 for rank in range(4)] for window in range(20)]
    assert not any(judged(moving))


def test_the_figures_for_the_log() -> None:
    stragglers = Stragglers(0, 3)
    stragglers.judge([0.1, 0.3, 0.1])
    assert stragglers.figures == {"slowest_rank": 1.0, "slowest_rank_ratio": 3.0}
    stragglers.judge([0.0, 0.0, 0.0])
    assert stragglers.figures["slowest_rank_ratio"] == 1.0


def test_shares_add_up_to_the_times_of_all_and_a_single_rank_has_none() -> None:
    ranks = [Stragglers(rank, 3) for rank in range(3)]
    for rank, stragglers in enumerate(ranks):
        for _ in range(4):
            stragglers.note(rank + 1.0)
    assert [sum(values) for values in zip(*(one.share() for one in ranks), strict=True)] == [1.0, 2.0, 3.0]
    assert ranks[0].share() == [0.0, 0.0, 0.0]
    assert Stragglers(0, 1).share() == []

"""Arrivals: at the asked rate, of the asked kind, the same again, and dealt out among processes."""

from __future__ import annotations

import numpy as np
import pytest

from serving.loadtest.schedule import Phase, arrivals


def test_poisson_arrivals_have_the_rate_and_the_spread_of_a_poisson_process() -> None:
    found = arrivals([Phase(200.0, 50.0, 50.0)], "poisson", seed=3)
    gaps = np.diff(found)
    assert pytest.approx(len(found), abs=4 * 100) == 10_000
    assert gaps.min() >= 0
    # Exponential gaps: mean and standard deviation are the same.
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    counts = np.histogram(found, bins=200, range=(0, 200))[0]
    assert counts.var() == pytest.approx(50, rel=0.35)


def test_constant_arrivals_are_evenly_spaced() -> None:
    found = arrivals([Phase(2.0, 100.0, 100.0)], "constant", seed=0)
    assert len(found) == 200
    assert np.diff(found) == pytest.approx(0.01)


@pytest.mark.parametrize("kind", ["constant", "poisson"])
def test_processes_make_the_whole_rate_together(kind: str) -> None:
    phases = [Phase(1.0, 0.0, 900.0), Phase(10.0, 900.0, 900.0)]
    parts = [arrivals(phases, kind, seed=1, part=part, parts=3) for part in range(3)]
    total = sum(map(len, parts))
    assert total == pytest.approx(9450, abs=0 if kind == "constant" else 4 * 97)
    if kind == "constant":
        assert np.sort(np.concatenate(parts)) == pytest.approx(arrivals(phases, kind, seed=1))
    else:
        assert not set(parts[0]) & set(parts[1])


def test_a_rising_rate_gives_half_the_requests_in_the_last_third() -> None:
    found = arrivals([Phase(10.0, 0.0, 100.0)], "constant", seed=0)
    assert len(found) == 500
    # The number since the start grows with the square of the time.
    assert (found < 10 / 2**0.5).sum() == pytest.approx(250, abs=1)
    falling = arrivals([Phase(10.0, 100.0, 0.0)], "constant", seed=0)
    assert 10 - falling[::-1] == pytest.approx(found, abs=1e-6)


def test_the_same_seed_gives_the_same_arrivals() -> None:
    first, again, other = (arrivals([Phase(1.0, 50.0, 50.0)], "poisson", seed=seed) for seed in (1, 1, 2))
    assert (first == again).all()
    assert len(first) != len(other) or (first != other).any()

"""Figures of records that are known, and the search for the highest rate on a server that is a formula."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from serving.loadtest import records
from serving.loadtest.measure import Load, Measured
from serving.loadtest.records import Records
from serving.loadtest.search import find_max
from serving.loadtest.slo import Objectives
from serving.loadtest.summary import course, summarise


def measured(latency: np.ndarray, end: np.ndarray | int = 200, lag: float = 0.0, rate: float = 100.0) -> Measured:
    count = len(latency)
    found = Records(
        due=np.arange(count) / rate,
        lag=np.full(count, lag, np.float32),
        latency=latency.astype(np.float32),
        end=np.broadcast_to(np.asarray(end, np.int16), (count,)),
    )
    load = Load(rate, count / rate, 0.0)
    return Measured(load, found, count / rate, count, count, cpu=0.3, most_in_flight=1, interrupted=False, examples={})


def test_percentiles_are_exact() -> None:
    shuffled = np.random.default_rng(0).permutation(np.arange(1, 1001)) / 1000
    found = summarise(measured(shuffled)).latency_ms
    assert found == pytest.approx({"p50": 500, "p90": 900, "p95": 950, "p99": 990, "p99.9": 999, "max": 1000}, rel=1e-6)


def test_errors_are_told_by_kind_and_only_time_outs_count_as_latencies() -> None:
    end = np.full(100, 200)
    end[:10], end[10:15], end[15:18], end[18] = 503, records.TIMEOUT, records.CLOSED, records.WRONG
    latency = np.where(end == records.TIMEOUT, 10.0, np.where(end == 200, 0.005, 0.001))
    found = summarise(measured(latency, end))
    assert found.errors == {"status 503": 10, "timeout": 5, "connection closed": 3, "wrong answer": 1}
    assert found.error_rate == pytest.approx(0.19)
    assert found.latency_ms is not None
    assert found.latency_ms["p50"] == pytest.approx(5) and found.latency_ms["p95"] == pytest.approx(10_000)
    nothing = summarise(measured(np.full(5, 0.1), 500))
    assert nothing.latency_ms is None and nothing.error_rate == 1 and nothing.measured()["p95_ms"] is None


def test_only_answers_within_the_measured_time_count_for_the_rate() -> None:
    # 100/s for 10 s on a server that needs 20 ms for each: half are answered in time.
    backlog = 0.02 + np.arange(1000) * 0.01
    found = summarise(measured(backlog))
    assert found.sent_rps == pytest.approx(100) and found.answered_rps == pytest.approx(50, abs=0.5)


def test_a_generator_that_could_not_keep_up_is_told() -> None:
    quick = measured(np.full(1000, 0.05), lag=0.001)
    assert summarise(quick).invalid is None
    assert "late" in str(summarise(measured(np.full(1000, 0.05), lag=0.02)).invalid)
    assert "of a core" in str(summarise(replace(quick, cpu=0.95)).invalid)
    assert "could be sent" in str(summarise(replace(quick, begun=900)).invalid)
    # A generator that has much to do right after a stall, which shows in latencies all the same.
    assert summarise(measured(np.full(1000, 1.0), lag=0.05)).invalid is None


def test_the_course_of_a_stall() -> None:
    due = np.arange(1000) / 100
    latency = np.where((due >= 4) & (due < 5), 5.02 - due, 0.005)
    found = course(measured(latency).records, 10.0)
    assert found.due_rps == pytest.approx(100)
    assert found.latency_ms["p50"][4] == pytest.approx(500, abs=20) and found.latency_ms["p99"][3] == pytest.approx(5)
    assert found.answered_rps[4] < 5 and found.answered_rps[5] > 190
    cut = course(measured(latency).records, 9.5)
    assert len(cut.starts) == 10 and cut.due_rps[9] == pytest.approx(100, abs=3)


@pytest.mark.parametrize("capacity", [7.3, 90.0, 1000.0, 6000.0])
def test_the_highest_rate_of_a_known_server_is_found_and_proven(capacity: float) -> None:
    """A queue with one server: latency is service time / (1 - load), so p99 is within 10 times that up to 90 %."""
    service = 1 / capacity
    proofs = []

    def attempt(rate: float, is_proof: bool) -> Measured:
        proofs.append(is_proof)
        latency = service / (1 - rate / capacity) if rate < capacity else 60.0
        return measured(np.full(2000, latency), rate=rate)

    found = find_max(100.0, Objectives(p99_ms=10 * service * 1e3), attempt, lambda step: None)
    assert found.best is not None
    assert 0.85 * capacity < found.best.rate <= 0.9 * capacity * 1.001
    assert proofs[-1] and not any(proofs[:-1]) and len(proofs) < 20
    assert "p99_ms" in found.limit


def test_a_search_tells_where_nothing_holds_and_where_the_generator_ends() -> None:
    slow = find_max(100, Objectives(p99_ms=1), lambda rate, _: measured(np.full(100, 1.0), rate=rate), lambda _: None)
    assert slow.best is None and slow.steps[-1].rate < 1

    def tired(rate: float, is_proof: bool) -> Measured:
        return replace(measured(np.full(100, 0.001), rate=rate), cpu=0.99 if rate > 500 else 0.5)

    bounded = find_max(100, Objectives(p99_ms=50), tired, lambda _: None)
    assert bounded.best is not None and 450 < bounded.best.rate <= 500
    assert "--processes" in bounded.limit

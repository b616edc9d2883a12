"""The parts of a rollout, one by one: bets, split, answers, state, and the plan as its page shows it."""

from __future__ import annotations

import asyncio
import json
import math
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documents import blocks
from harness import ROOT
from hypothesis import given
from hypothesis import strategies as st
from processes import wait_until

from serving.rollout.answers import deviation, label_of
from serving.rollout.betting import Difference, Exceedance, Slowdown
from serving.rollout.decide import Standing, decide
from serving.rollout.evidence import Evidence, Observation
from serving.rollout.hook import Hook
from serving.rollout.judge import PORTIONS, judge
from serving.rollout.plan import Limits, Margins, Plan, Split, Step, load
from serving.rollout.split import RECORD, Splitter
from serving.rollout.state import StateDirectory


def test_nobody_wins_by_betting_on_a_fair_coin() -> None:
    """The mean wealth stays at 1, or below, whatever the outcomes are: here they follow each other, with jumps."""
    draw = np.random.default_rng(0)
    ends = []
    for _ in range(400):
        count, share = 192, 0.2
        failed = (draw.random(count // 8) < 0.2).repeat(8).astype(float)
        seconds = np.exp(np.cumsum(draw.normal(0, 0.1, count)))
        is_new = draw.random(count) < share
        errors, slower = Difference([0.0]), Slowdown([1.0])
        for start in range(0, count, 32):
            part = slice(start, start + 32)
            errors.update(failed[part], is_new[part], np.full(32, share))
            slower.update(seconds[part], is_new[part], np.full(32, share))
        ends.append([errors.against_at_most(0.0), errors.against_at_least(0.0), slower.against_at_most(1.0)])
    wealth = np.exp(np.array(ends))
    assert (wealth.mean(axis=0) < 1.0 + 4.0 * wealth.std(axis=0) / 20.0).all()
    assert (np.mean(wealth >= 20.0, axis=0) <= 0.05).all()


def test_the_interval_finds_the_difference() -> None:
    draw = np.random.default_rng(0)
    is_new = draw.random(20_000) < 0.5
    failed = draw.random(20_000) < np.where(is_new, 0.08, 0.02)
    bets = Difference([-0.01, 0.0, 0.02, 0.04, 0.05, 0.07, 0.08, 0.1])
    bets.update(failed.astype(float), is_new, np.full(20_000, 0.5))
    assert bets.interval(0.01) in ((0.05, 0.07), (0.04, 0.07), (0.04, 0.08), (0.05, 0.08))
    seconds = np.exp(draw.normal(0, 0.3, 20_000)) * np.where(is_new, 1.25, 1.0)
    slower = Slowdown([0.9, 1.0, 1.1, 1.2, 1.3, 1.4])
    slower.update(seconds, is_new, np.full(20_000, 0.5))
    assert slower.interval(0.01) == (1.2, 1.3)


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 9))
def test_late_evidence_is_the_best_of_all_beginnings(bad: list[bool], size: int) -> None:
    bets = Exceedance(0.05)
    for start in range(0, len(bad), size):
        bets.update(np.array(bad[start : start + size]), 0.0)
    rates = np.array([0.1, 0.15, 0.25, 0.5])
    won = np.where(np.array(bad)[:, None], np.log(rates / 0.05), np.log((1 - rates) / 0.95))
    expected = [max(won[start:, column].sum() for start in range(len(bad))) for column in range(4)]
    assert bets.lately() == pytest.approx(math.log(np.mean(np.exp(expected))))
    assert bets.since_the_start() == pytest.approx(math.log(np.mean(np.exp(won.sum(axis=0)))))


def test_one_error_among_ten_requests_is_not_ten_percent() -> None:
    plan, evidence = Plan(), Evidence(Plan())
    for number in range(10):
        evidence.observe([Observation(True, 0.1, 0.01, 500 if number == 3 else 200)], float(number))
    assert judge(plan, evidence, 10.0)[0].level != "worse"
    for number in range(4):
        evidence.observe([Observation(True, 0.1, 0.01, 0)], 10.0 + number)
    assert judge(plan, evidence, 14.0)[0].level == "worse"
    assert sum(PORTIONS.values()) == pytest.approx(1.0)


def test_evidence_goes_through_json_and_goes_on_alike() -> None:
    plan, draw = Plan(), np.random.default_rng(0)
    seen = [
        Observation(
            bool(draw.random() < 0.5), 0.5, float(draw.exponential(0.01)), 500 if draw.random() < 0.1 else 200, "a"
        )
        for _ in range(300)
    ]
    one = Evidence(plan)
    one.observe(seen[:200], 1.0)
    other = Evidence.restore(plan, json.loads(json.dumps(one.state())))
    for evidence in (one, other):
        evidence.observe(seen[200:], 2.0)
        evidence.learn([True, False], [True, False], [0.5, 0.5])
    assert one.errors.state() == other.errors.state() and one.wrong.state() == other.wrong.state()
    assert [f.text for f in judge(plan, one, 3.0)] == [f.text for f in judge(plan, other, 3.0)]


def test_decisions_in_their_order() -> None:
    plan = Plan(steps=(Step(10.0, 10.0, 100), Step(100.0, 10.0, 100)))
    findings = judge(plan, Evidence(plan), 0.0)
    assert decide(plan, Standing(0, 11.0, 99), findings).action == "hold"
    assert decide(plan, Standing(0, 9.0, 1000), findings).action == "hold"
    assert decide(plan, Standing(0, 11.0, 101), findings).action == "advance"
    assert decide(plan, Standing(1, 11.0, 101), findings).action == "promote"
    assert decide(plan, Standing(1, 11.0, 101, crashes=2), findings).kind == "crashes"
    assert decide(plan, Standing(1, 11.0, 101, unready_seconds=61.0), findings).kind == "unready"
    shadow = Plan(strategy="shadow")
    assert "promote, or rollback" in decide(shadow, Standing(0, 601.0, 1000), findings).reason


def test_whoever_is_on_the_new_version_stays_when_its_share_grows() -> None:
    splitter = Splitter(Split(sticky="header:X-User"), "salt")
    users = [{"X-User": str(number)} for number in range(2000)]
    first = [splitter.route(user, "", 0.1) for user in users]
    again = [splitter.route(user, "", 0.1) for user in users]
    more = [splitter.route(user, "", 0.5) for user in users]
    assert all(before.is_new == after.is_new for before, after in zip(first, again, strict=True))
    assert all(after.is_new for before, after in zip(first, more, strict=True) if before.is_new)
    assert {route.share for route in first} == {0.1} and {route.share for route in again} == {None}
    drawn = [route for route in more if route.share is not None]
    assert {round(route.share or 0.0, 6) for route in drawn} == {round(0.4 / 0.9, 6)}
    assert np.mean([route.is_new for route in drawn]) == pytest.approx(0.4 / 0.9, abs=0.05)
    assert np.mean([route.is_new for route in first]) == pytest.approx(0.1, abs=0.03)
    other = Splitter(Split(sticky="header:X-User"), "salt")
    other.remember(splitter.written())
    assert other.route(users[0], "", 0.5).share is None and not splitter.written()
    assert RECORD.size == 16


@pytest.mark.parametrize(
    ("sticky", "headers", "key"),
    [
        ("client", {}, "1.2.3.4"),
        ("api-key", {"Authorization": "Bearer x"}, "Bearer x"),
        ("api-key", {"X-API-Key": "y"}, "y"),
        ("cookie:id", {"Cookie": "a=b; id=7"}, "7"),
        ("cookie:id", {"Cookie": "\x00;;=;"}, None),
        ("header:X-User", {}, None),
        ("", {"X-User": "u"}, None),
    ],
)
def test_keys(sticky: str, headers: dict[str, str], key: str | None) -> None:
    assert Splitter(Split(sticky=sticky), "s").route(headers, "1.2.3.4", 0.5).key == key


def test_versions_are_asked_for_by_header() -> None:
    splitter = Splitter(Split(header="X-Beta: yes"), "s")
    versions = ("aaa", "bbb")
    assert splitter.route({"X-Model-Version": "bbb"}, "", 0.0, versions).is_new
    assert not splitter.route({"X-Model-Version": "aaa"}, "", 1.0, versions).is_new
    assert splitter.route({"X-Beta": "yes"}, "", 0.0, versions).is_new
    assert not splitter.route({"X-Beta": "no"}, "", 0.0, versions).is_new
    assert splitter.route({"X-Model-Version": "zzz"}, "", 1.0, versions).share == 1.0


@pytest.mark.parametrize(
    ("body", "label"),
    [
        (b'{"model": "m", "predictions": [{"label": "a \\"b\\"", "index": 1}]}', 'a "b"'),
        (b'{"predictions": [{"label": 7}]}', "7"),
        (b'{"predictions": [{"y": [1.0]}]}', None),
        (b"no json", None),
    ],
)
def test_labels_of_answers(body: bytes, label: str | None) -> None:
    assert label_of("application/json; charset=utf-8", body) == label
    assert label_of("text/plain", body) is None


@pytest.mark.parametrize(
    ("expected", "answered", "off"),
    [
        ({"a": [1.0, 20.0]}, {"a": [1.0, 21.0]}, 0.05),
        ({"a": "x"}, {"a": "y"}, math.inf),
        ([1], [1, 2], math.inf),
        ([1.0], [float("nan")], math.inf),
        ({"a": True, "b": None}, {"a": True, "b": None}, 0.0),
        (True, 1, math.inf),
    ],
)
def test_deviations(expected: Any, answered: Any, off: float) -> None:
    assert deviation(expected, answered) == pytest.approx(off)


def test_torn_lines_and_records_are_left_behind(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path)
    (tmp_path / "log").write_bytes(b'{"a": 1}\n{"a": 2')
    directory.append("log", [{"a": 3}])
    assert directory.lines("log") == [{"a": 1}, {"a": 3}]
    (tmp_path / "keys").write_bytes(b"x" * 37)
    assert len(directory.records_of("keys", 16)) == 32 == (tmp_path / "keys").stat().st_size


def test_a_hook_is_tried_until_it_succeeds(tmp_path: Path) -> None:
    script = "import sys, pathlib; p = pathlib.Path(sys.argv[1]); sys.exit(0 if p.exists() else 'not there')"
    told: list[dict[str, Any]] = []

    async def check() -> None:
        hook = Hook([sys.executable, "-c", script, str(tmp_path / "go")], lambda _, figures: told.append(figures))
        hook.notify({"event": "promoted", "version": "v"})
        deadline = asyncio.get_running_loop().time() + 60
        while hook.pending is not None and asyncio.get_running_loop().time() < deadline:
            if told:
                (tmp_path / "go").touch()
            await asyncio.sleep(0.02)
        await hook.close()

    asyncio.run(check())
    assert [entry["ok"] for entry in told] == [False, True] and told[0]["error"] == "not there"
    assert wait_until(lambda: told[-1]["ok"], "the hook")


def test_the_page_shows_a_plan_that_loads_and_every_key_with_its_default(tmp_path: Path) -> None:
    page = ROOT / "docs" / "rollout.md"
    (text,) = [block.text for block in blocks(page) if block.text.startswith("# plan.yaml")]
    (tmp_path / "plan.yaml").write_text(text)
    assert load(tmp_path / "plan.yaml").limits.p95_ms == 200
    _, _, table = page.read_text().partition("| key | default |")
    rows = dict(re.findall(r"^\| (`[^|]+`) \| ([^|]+) \|", table.partition("**Who")[0], re.MULTILINE))
    named = {name: value.strip().strip("`") for keys, value in rows.items() for name in re.findall(r"`([^`]+)`", keys)}
    known: dict[str, Any] = {item.name: getattr(Plan(), item.name) for item in fields(Plan)}
    for section, cls in (("limits", Limits), ("margins", Margins), ("split", Split)):
        known.pop(section)
        known |= {f"{section}.{item.name}": getattr(cls(), item.name) for item in fields(cls)}
    assert not known.keys() - named.keys()
    for name, value in known.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "golden":
            assert float(named[name]) == value, name

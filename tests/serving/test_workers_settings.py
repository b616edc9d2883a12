"""How many threads a worker gets: the container's share of the cores, and one for a light model."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from serving.language.settings import LanguageSettings
from serving.workers import settings
from serving.workers.process import REQUEST_SECONDS, is_light
from serving.workers.settings import Settings, cores


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 64),
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
    ],
)
def test_a_container_has_no_more_cores_than_it_may_use(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(settings, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert cores() == expected
    assert Settings(workers=2).threads_each() == max(1, expected // 2)
    assert Settings(workers=200).threads_each() == 1 and Settings(threads=5).threads_each() == 5
    assert Settings(workers=2, cores=6).threads_each() == 3 and Settings(cores=6, threads=1).threads_each() == 1
    assert LanguageSettings(cores=6).threads_used() == 6 and LanguageSettings(cores=6, threads=2).threads_used() == 2
    assert LanguageSettings().threads_used() == expected


def test_a_light_model_leaves_the_cores_to_the_front() -> None:
    asked: list[int] = []

    def run(seconds: float, each: float) -> bool:
        asked.clear()
        return is_light(lambda size: (asked.append(size), time.sleep(seconds + each * size)), 100)

    enough = 100 * REQUEST_SECONDS
    assert run(0.0, 0.0) and asked[-1] == 100
    assert not run(0.0, enough / 50)
    assert not run(3 * enough, 0.0) and set(asked) == {1}, "no batch of what is slow already"
